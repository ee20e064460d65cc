package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const qemuProgram = "qemu-system-x86_64"

// quitPatience is how long a guest may need to say where it was after the timeout.
const quitPatience = 20 * time.Second

// A machine is a guest to be.
type machine struct {
	kernel         string // absolute path of a bzImage
	job            job
	program        string // path on the host of what the job runs; "" when the guest has it
	timeout        time.Duration
	memory         int // MiB
	cpus           int
	env            []string // of the program, beside what every one gets
	folders        []string // further ones that the guest sees
	disks          []string // absolute paths of further disks
	writes         string   // absolute path of the log of the first one's writes, or ""
	stdout, stderr *os.File
}

// An outcome is what is known after a guest has ended.
type outcome struct {
	result    *result // nil: the guest ended without one
	timedOut  bool
	kernelLog string
}

// disks are the guest's, in the order of their devices.
var disks = []struct {
	name string
	size int64
}{{"cache.ext4", 4 << 30}, {"small.ext4", 64 << 20}}

// Names in the folder of a guest, which is QEMU's working directory.
const (
	initramfsName = "initramfs"
	logName       = "kernel.log"
)

// run boots the machine and returns when it is off. The error is about QEMU and the
// host, not about what happened in the guest.
func (m *machine) run(ctx context.Context) (o outcome, err error) {
	dir, err := os.MkdirTemp("", "erofsd-vm-*")
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := writeInitramfs(filepath.Join(dir, initramfsName), &m.job, m.program); err != nil {
		return o, fmt.Errorf("make the initramfs: %w", err)
	}
	for _, d := range disks {
		if err := makeDisk(ctx, filepath.Join(dir, d.name), d.size); err != nil {
			return o, fmt.Errorf("make a disk: %w", err)
		}
	}
	if o, err = m.boot(ctx, dir); err != nil {
		return o, err
	}
	log, err := os.ReadFile(filepath.Join(dir, logName))
	o.kernelLog = string(bytes.ReplaceAll(log, []byte("\r"), nil))
	return o, err
}

// makeDisk makes a sparse file with an empty ext4.
func makeDisk(ctx context.Context, name string, size int64) error {
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(name, size); err != nil {
		return err
	}
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		mkfs = "/usr/sbin/mkfs.ext4" // which only root has in its path
	}
	const options = "nodiscard,lazy_itable_init=1,lazy_journal_init=1"
	out, err := exec.CommandContext(ctx, mkfs, "-q", "-F", "-m", "0", "-E", options, name).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// A port is a line between guest and host: a socket pair, of which QEMU gets the
// guest's end, so that nothing of it has a name that another guest could meet.
type port struct {
	name        string
	host, guest *os.File
	to          io.Writer // where the bytes of the guest go
}

func newPort(name string, to io.Writer) (*port, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("make the port %s: socketpair: %w", name, err)
	}
	return &port{name, os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name), to}, nil
}

// ports makes the control port, whose messages go to report, and those for the
// program's output.
func (m *machine) ports(report io.Writer) (list []*port, err error) {
	to := map[string]io.Writer{controlPort: report, stdoutPort: m.stdout}
	names := []string{controlPort, stdoutPort}
	if m.job.Stderr {
		to[stderrPort], names = m.stderr, append(names, stderrPort)
	}
	for _, name := range names {
		p, err := newPort(name, to[name])
		if err != nil {
			closePorts(list)
			return nil, err
		}
		list = append(list, p)
	}
	return list, nil
}

func closePorts(list []*port) {
	for _, p := range list {
		p.host.Close()
		p.guest.Close()
	}
}

// boot runs QEMU to its end.
func (m *machine) boot(ctx context.Context, dir string) (o outcome, err error) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var said, report bytes.Buffer
	ports, err := m.ports(&report)
	if err != nil {
		return o, err
	}
	defer closePorts(ports)
	cmd := exec.CommandContext(ctx, qemuProgram, m.args(ports)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, &said, &said
	// Killed with this thread, which is the process's first and lives as long.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	for _, p := range ports {
		cmd.ExtraFiles = append(cmd.ExtraFiles, p.guest)
	}
	if err := cmd.Start(); err != nil {
		return o, fmt.Errorf("start the guest: %w", err)
	}
	var copies sync.WaitGroup
	for _, p := range ports {
		p.guest.Close() // QEMU's end is then the end of the line
		copies.Go(func() {
			if _, err := io.Copy(p.to, p.host); err != nil {
				stop() // nobody reads what the guest prints
			}
		})
	}
	var timedOut atomic.Bool
	watch := time.AfterFunc(m.timeout, func() {
		timedOut.Store(true)
		fmt.Fprintln(ports[0].host, quit)
		time.AfterFunc(quitPatience, stop)
	})
	defer watch.Stop()
	err = cmd.Wait()
	copies.Wait()
	o.timedOut = timedOut.Load()
	if r := new(result); json.Unmarshal(report.Bytes(), r) == nil {
		o.result = r
	}
	if err != nil && o.result == nil && !o.timedOut {
		return o, fmt.Errorf("%s: %w: %s", qemuProgram, err, bytes.TrimSpace(said.Bytes()))
	}
	return o, nil
}

// args is QEMU's command line. The guest is always emulated: where /dev/kvm is that
// of a nested hypervisor, a stock guest may hang in it.
func (m *machine) args(ports []*port) []string {
	args := []string{
		"-machine", "pc,i8042=off", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", strconv.Itoa(m.cpus), "-m", strconv.Itoa(m.memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot",
		"-kernel", m.kernel, "-initrd", initramfsName, "-append", "console=ttyS0 printk.devkmsg=on panic=-1 reboot=t",
		"-serial", "file:" + logName, "-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
	}
	for _, d := range disks {
		args = append(args,
			"-drive", "format=raw,if=none,id="+d.name+",cache=unsafe,discard=unmap,file="+d.name,
			"-device", "virtio-blk-pci,drive="+d.name) // not if=virtio: those come behind all devices
	}
	args = append(args, m.furtherDisks()...)
	for i, p := range ports {
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=%s,fd=%d", p.name, 3+i), // 3: the first of ExtraFiles
			"-device", fmt.Sprintf("virtserialport,chardev=%s,name=%s", p.name, p.name))
	}
	for _, s := range m.job.Shares {
		args = append(args, "-virtfs", "local,security_model=none,readonly=on,multidevs=remap,mount_tag="+s.Tag+",path="+s.Path)
	}
	return args
}
