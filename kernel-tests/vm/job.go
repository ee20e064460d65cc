package main

// A job is what the host asks the guest to do. It lies as JSON in the initramfs.
type job struct {
	Args     []string // the program, by its path in the guest, and its arguments
	Env      []string
	Dir      string // working directory
	Hostname string
	Shares   []share // parents before what lies below them
	Stderr   bool    // standard error has a port of its own
}

// A share is a folder of the host that the guest sees, read-only, at the same path.
type share struct{ Tag, Path string }

// A result is what the guest sends back, one line of JSON on the control port.
type result struct {
	Exit    int    // as a shell has it: 128 and more is a signal
	Problem string // what went wrong in the guest around the program
}

const (
	initPath    = "/init"
	jobPath     = "/job.json"
	programDir  = "/program"
	cacheDir    = "/cache" // ext4 of 4 GiB, for the kernel's cache
	smallDir    = "/small" // ext4 of 64 MiB, for tests that fill a file system
	stdoutPort  = "stdout"
	stderrPort  = "stderr"
	controlPort = "control"
	startMark   = "vm: the boot ends" // in the kernel's log
	endMark     = "vm: the job ends"
	quit        = "quit" // host to guest: end the program and say where it was
)
