// Package sandbox takes from the calling process, for ever, what it does not need:
// capabilities, new privileges (no_new_privs), writing outside of its directories
// (Landlock), and system calls (seccomp). It changes every thread, so it needs a program
// built without cgo, as ours are.
//
// [Enter] is everything; [Probe] says beforehand what this kernel has. Each part has a file
// of its own: privileges.go, landlock.go, and seccomp.go with the list of what is refused in
// calls.go.
//
// Reading is not restricted: where images, their logins and certificates are is said by the
// API, later.
package sandbox
