package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// mounts are the file systems that a program expects, in this order. Those below /sys
// are left out where a kernel, which -kernel may name, has not got them.
var mounts = []struct{ source, target, kind, options string }{
	{"proc", "/proc", "proc", ""},
	{"sysfs", "/sys", "sysfs", ""},
	{"devtmpfs", "/dev", "devtmpfs", ""},
	{"devpts", "/dev/pts", "devpts", "ptmxmode=666"},
	{"tmpfs", "/dev/shm", "tmpfs", ""},
	{"tmpfs", "/run", "tmpfs", ""},
	{"tmpfs", "/tmp", "tmpfs", ""},
	{"tracefs", "/sys/kernel/tracing", "tracefs", ""},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", ""},
	{"/dev/vda", cacheDir, "ext4", "noinit_itable"},
	{"/dev/vdb", smallDir, "ext4", "noinit_itable"},
}

// patience is how long a process may need to end, and its output with it. One that
// the kernel holds does not end at all.
const patience = 5 * time.Second

// guestMain is the first process of the guest. It does the job, reports and turns the
// machine off. What it prints goes to the kernel's log.
func guestMain() {
	var r result
	control, err := prepare()
	if err == nil {
		r, err = runJob(control)
	}
	if err != nil {
		r = result{Exit: exitProblem, Problem: err.Error()}
		fmt.Println("vm: " + r.Problem)
	}
	if control != nil {
		if err := json.NewEncoder(control).Encode(r); err != nil {
			fmt.Println("vm: report the result:", err)
		}
	}
	fmt.Println(endMark)
	fmt.Println("vm: turn off:", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF))
}

// prepare mounts the file systems and opens the port to the host.
func prepare() (control *os.File, err error) {
	const early = 3 // what the kernel's log and the port take
	for _, m := range mounts[:early] {
		if err := mount(m.source, m.target, m.kind, 0, m.options); err != nil {
			return nil, err
		}
	}
	if err := printToKernelLog(); err != nil {
		return nil, err
	}
	if control, err = openPort(controlPort); err != nil {
		return nil, err
	}
	for _, m := range mounts[early:] {
		if _, err := os.Stat(m.target); err != nil && strings.HasPrefix(m.target, "/sys/") {
			continue
		}
		if err := mount(m.source, m.target, m.kind, 0, m.options); err != nil {
			return control, err
		}
	}
	fmt.Println(startMark)
	return control, nil
}

// printToKernelLog leads this process's own output there. The console, where it goes
// before, loses what it has not sent when the machine is turned off.
func printToKernelLog() error {
	kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer kmsg.Close()
	for _, fd := range []int{unix.Stdout, unix.Stderr} {
		if err := unix.Dup3(int(kmsg.Fd()), fd, 0); err != nil {
			return fmt.Errorf("print to the kernel's log: %w", err)
		}
	}
	return nil
}

func mount(source, target, kind string, flags uintptr, options string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s at %s (%s %s): %w", source, target, kind, options, err)
	}
	return nil
}

// openPort opens the virtio port of a name. Ports appear a moment after the boot. The
// descriptor blocks: a write returns when the host has the bytes, so that none is
// lost when the machine is turned off.
func openPort(name string) (*os.File, error) {
	for range 500 {
		dirs, err := filepath.Glob("/sys/class/virtio-ports/*")
		if err != nil {
			return nil, err
		}
		for _, dir := range dirs {
			text, err := os.ReadFile(filepath.Join(dir, "name"))
			if err != nil || strings.TrimSpace(string(text)) != name {
				continue
			}
			dev := filepath.Join("/dev", filepath.Base(dir))
			fd, err := unix.Open(dev, unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("open the port %s: %w", name, err)
			}
			return os.NewFile(uintptr(fd), dev), nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return nil, fmt.Errorf("open the port %s: the machine has none", name)
}

func runJob(control *os.File) (r result, err error) {
	var j job
	text, err := os.ReadFile(jobPath)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &j); err != nil {
		return r, fmt.Errorf("read the job: %w", err)
	}
	if err := settle(&j); err != nil {
		return r, err
	}
	out, err := newOutput(j.Stderr)
	if err != nil {
		return r, err
	}
	pid, err := start(&j, out)
	if err != nil {
		return r, err
	}
	go obey(control, pid)
	status, err := reap(pid)
	if err != nil {
		return r, err
	}
	r.Exit = status.ExitStatus()
	if status.Signaled() {
		r.Exit = 128 + int(status.Signal())
		r.Problem = "a signal ended the program: " + status.Signal().String()
	}
	return r, out.finish()
}

// settle makes the guest a place where the job's program can run.
func settle(j *job) error {
	for _, s := range j.Shares {
		const options = "trans=virtio,version=9p2000.L,msize=512000,cache=loose"
		if err := mount(s.Tag, s.Path, "9p", unix.MS_RDONLY, options); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(filepath.Join(cacheDir, "tmp"), 0o777); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(j.Hostname)); err != nil {
		return fmt.Errorf("set the host's name: %w", err)
	}
	const files = 1 << 16
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files, Max: files}); err != nil {
		return fmt.Errorf("allow %d open files: %w", files, err)
	}
	return loopbackUp()
}

// loopbackUp does what "ip link set lo up" does.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("switch on the loopback network: %w", err)
	}
	defer unix.Close(s)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, request); err != nil {
		return fmt.Errorf("switch on the loopback network: %w", err)
	}
	return nil
}

// start runs the job's program. It is not an exec.Cmd: the first process of a machine
// waits for whatever ends, and would take the program's end away from it.
func start(j *job, out *output) (pid int, err error) {
	defer out.closeWriters()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	for _, v := range j.Env {
		name, value, _ := strings.Cut(v, "=")
		if err := os.Setenv(name, value); err != nil {
			return 0, err
		}
	}
	path, err := exec.LookPath(j.Args[0])
	if err != nil {
		return 0, fmt.Errorf("find the program in the guest: %w", err)
	}
	pid, err = syscall.ForkExec(path, j.Args, &syscall.ProcAttr{
		Dir: j.Dir, Env: j.Env,
		Files: []uintptr{null.Fd(), out.writers[0].Fd(), out.writers[len(out.writers)-1].Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start %s: %w", path, err)
	}
	return pid, nil
}

// reap waits for every process that ends, until it is pid's turn.
func reap(pid int) (unix.WaitStatus, error) {
	for {
		var status unix.WaitStatus
		switch ended, err := unix.Wait4(-1, &status, 0, nil); {
		case err == unix.EINTR:
		case err != nil:
			return status, fmt.Errorf("wait for the program: %w", err)
		case ended == pid:
			return status, nil
		}
	}
}

// obey waits for the host's word to end the program. Where it waits for the kernel,
// the kernel's log says so afterwards; a Go program prints its goroutines.
func obey(control io.Reader, pid int) {
	lines := bufio.NewScanner(control)
	for lines.Scan() {
		if lines.Text() != quit {
			continue
		}
		// w: tasks that cannot be interrupted, Documentation/admin-guide/sysrq.rst
		if err := os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0); err != nil {
			fmt.Println("vm: show the blocked tasks:", err)
		}
		for _, signal := range []unix.Signal{unix.SIGQUIT, unix.SIGKILL} {
			if err := unix.Kill(pid, signal); err != nil {
				fmt.Println("vm: end the program:", err)
			}
			time.Sleep(patience)
		}
	}
}

// output takes what a program prints to the host's ports. The program has pipes, as
// it would have below go test: it may open them again, and share them with children.
type output struct {
	writers []*os.File // standard output and, with a port of its own, standard error
	copied  chan error // one message each
}

func newOutput(stderr bool) (*output, error) {
	names := []string{stdoutPort}
	if stderr {
		names = append(names, stderrPort)
	}
	o := &output{copied: make(chan error, len(names))}
	for _, name := range names {
		port, err := openPort(name)
		if err != nil {
			return nil, err
		}
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		o.writers = append(o.writers, w)
		go func() {
			_, err := io.Copy(struct{ io.Writer }{port}, r) // no splice: every byte has arrived when the write returns
			o.copied <- err
		}()
	}
	return o, nil
}

func (o *output) closeWriters() {
	for _, w := range o.writers {
		w.Close()
	}
}

// finish waits until the host has all output. Processes that the program left behind
// are killed for that.
func (o *output) finish() error {
	if err := unix.Kill(-1, unix.SIGKILL); err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill what is left: %w", err)
	}
	late := time.After(patience)
	var all error
	for range o.writers {
		select {
		case err := <-o.copied:
			all = errors.Join(all, err)
		case <-late:
			return errors.New("a process that the program left behind cannot be killed and holds its output")
		}
	}
	return all
}
