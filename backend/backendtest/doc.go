// Package backendtest is for tests: one conformance suite for every
// [backend.Store], a store in memory, and faults to put into stores ([Inject]) and
// before HTTP servers ([HTTPFaults]).
//
// It never starts a server or picks a port itself. Read [Run] and [HTTPFaults]
// first. Every type has one mutex; none is held while something else is called.
package backendtest
