// Command vm runs a program, usually the tests of a package, in a virtual machine
// with a kernel of its own:
//
//	go test -exec 'vm -kernel 6.12' ./cachefiles
//	vm -kernel 6.1 ./cachefiles.test -test.v
//	vm -kernel 6.1 sh -c 'cat /proc/filesystems'
//
// The machine is QEMU; this program is also the first process in it. The program sees
// the module's folder and ../shared read-only where they are on the host, an empty
// ext4 of 4 GiB in $EROFSD_TEST_DIR, another of 64 MiB in $EROFSD_TEST_SMALL_DIR, the
// disks that -disk names, and nothing else of the host. What it prints and its exit code
// are this program's.
//
// A kernel that complains (BUG, Oops, WARNING, a task that hangs) fails the run.
// Guests are emulated, so times in them say nothing about the host.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"
)

// exitProblem is the exit code when something around the program went wrong.
const exitProblem = 125

func main() {
	if os.Getpid() == 1 && os.Args[0] == initPath {
		guestMain()
		return
	}
	runtime.LockOSThread() // QEMU dies with the thread that started it
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT)
	code, err := hostMain(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
	}
	os.Exit(code)
}

func hostMain(ctx context.Context, args []string) (code int, err error) {
	flags := flag.NewFlagSet("vm", flag.ContinueOnError)
	kernel := flags.String("kernel", "", "`row` of the guest kernel, as 6.12, or the path of a bzImage")
	timeout := flags.Duration("timeout", 10*time.Minute, "`time` after which the guest is stopped and says where it was")
	memory := flags.Int("memory", 2048, "`MiB` of the guest")
	cpus := flags.Int("cpus", 2, "`number` of the guest's processors")
	verbose := flags.Bool("log", false, "print all of the kernel's log, always")
	var m machine
	flags.Func("disk", "image `file` of a further disk of the guest: /dev/vdc and on, in their order", m.addDisk)
	flags.Func("share", "`folder` of the host that the guest sees as well, read-only, at its path", m.addShare)
	flags.Func("env", "`NAME=VALUE` of the program's environment", m.addEnv)
	flags.StringVar(&m.writes, "log-writes", "", "`file` that gets a log of all writes and flushes of the first -disk, as dm-log-writes makes it")
	flags.Usage = func() {
		fmt.Fprintln(flags.Output(), "usage: vm -kernel ROW [flags] [--] PROGRAM [argument...]\n\nPROGRAM is a static program of the host, or by its bare name one of the guest: sh.")
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0, nil
		}
		return exitProblem, nil // flags has said what is wrong
	}
	if flags.NArg() == 0 || *kernel == "" {
		flags.Usage()
		return exitProblem, errors.New("a kernel and a program are needed")
	}
	m.timeout, m.memory, m.cpus, m.stdout, m.stderr = *timeout, *memory, *cpus, os.Stdout, os.Stderr
	if m.kernel, err = findKernel(ctx, *kernel); err != nil {
		return exitProblem, err
	}
	if err := errors.Join(m.prepare(*kernel, flags.Args()), m.logWrites()); err != nil {
		return exitProblem, err
	}
	o, err := m.run(ctx)
	if ctx.Err() != nil {
		return exitProblem, errors.New("interrupted")
	}
	if err != nil {
		return exitProblem, err
	}
	code = o.judge(os.Stderr, *timeout)
	if log := o.logExcerpt(); *verbose {
		fmt.Fprint(os.Stderr, o.kernelLog)
	} else if code != 0 && log != "" {
		fmt.Fprint(os.Stderr, "vm: from the log of the guest's kernel:\n", log)
	}
	return code, nil
}
