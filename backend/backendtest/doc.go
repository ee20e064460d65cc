// Package backendtest is for tests: one conformance suite for every
// [backend.Store], one fault table ([Faults]) for those that speak HTTP, a store in
// memory, and faults to put into stores ([Inject]) and before HTTP servers
// ([HTTPFaults]).
//
// The servers of stores are the business of their tests. Read [Run] and [HTTPFaults]
// first. Every type has one mutex; none is held while something else is called.
package backendtest
