// Package fdstore is the part of a service manager that keeps file descriptors for a
// service (sd_notify(3), "FDSTORE=1"), and hears its signs of life ("WATCHDOG=1"). What a
// service has stored it gets back when it is started again, whatever it died of.
//
// A [Store] belongs to the process that starts the service. Where that process has a
// service manager itself, a [Manager], everything is stored there too, with the socket that
// the service speaks to: then the next process goes on where this one was, and the service
// notices nothing ([Inherit]).
//
// The package knows nothing of what is stored. One goroutine reads the socket; the lock
// guards a table, and is never held while anything is waited for.
package fdstore
