// Package failpoint names the places where a test kills the process.
//
// In a release build [Hit] is empty and costs nothing. A program built with the
// tag failpoint reads EROFSD_FAILPOINT at its first hit:
//
//	EROFSD_FAILPOINT=name=action[@n][,name=action[@n]...]
//
// name is one of [Names], action is one of
//
//	kill   SIGKILL to itself
//	oom    take memory until the kernel's out-of-memory killer ends the process: for one
//	       in a cgroup with a limit below a gigabyte
//	segv   SIGSEGV to itself, on which the runtime ends the process
//	exit   exit with code 1, without running anything deferred
//	panic  panic in the goroutine that hits
//	sleep  the goroutine that hits stays there for ever
//	stop   SIGSTOP to itself; SIGCONT lets it go on
//
// and n says at which hit, counted from 1 (the default). A variable that cannot be
// understood is a panic: a test whose process does not die would show nothing.
//
// The package imports nothing of ours, and any of ours may import it.
package failpoint
