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

// A machine is a guest to be.
type machine struct {
	kernel  string // path of a bzImage
	job     job
	program string // path on the host of what the job runs; "" when the guest has it
	timeout time.Duration
	memory  int // MiB
	stdout  *os.File
	stderr  *os.File
}

// quitPatience is how long a guest may need to say where it was after the timeout.
const quitPatience = 20 * time.Second

// An outcome is what is known after a guest has ended.
type outcome struct {
	result    *result // nil: the guest ended without one
	timedOut  bool
	kernelLog string
}

// run boots the machine and returns when it is off. The error is about QEMU and the
// host, not about what happened in the guest.
func (m *machine) run(ctx context.Context) (o outcome, err error) {
	dir, err := os.MkdirTemp("", "erofsd-vm-*")
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := writeInitramfs(filepath.Join(dir, "initramfs"), &m.job, m.program); err != nil {
		return o, fmt.Errorf("make the initramfs: %w", err)
	}
	if err := m.makeDisks(ctx, dir); err != nil {
		return o, err
	}
	ports, err := m.ports()
	if err != nil {
		return o, err
	}
	if err := m.boot(ctx, dir, ports, &o); err != nil {
		return o, err
	}
	log, err := os.ReadFile(filepath.Join(dir, "kernel.log"))
	o.kernelLog = string(bytes.ReplaceAll(log, []byte("\r"), nil))
	return o, err
}

// disks are the guest's, in the order of their devices.
var disks = []struct {
	name string
	size int64
}{{"cache.ext4", 4 << 30}, {"small.ext4", 64 << 20}}

func (m *machine) makeDisks(ctx context.Context, dir string) error {
	for _, d := range disks {
		name := filepath.Join(dir, d.name)
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			return err
		}
		if err := os.Truncate(name, d.size); err != nil {
			return err
		}
		const options = "nodiscard,lazy_itable_init=1,lazy_journal_init=1"
		out, err := exec.CommandContext(ctx, mkfs(), "-q", "-F", "-m", "0", "-E", options, name).CombinedOutput()
		if err != nil {
			return fmt.Errorf("make the disk %s: mkfs.ext4: %w: %s", d.name, err, bytes.TrimSpace(out))
		}
	}
	return nil
}

// mkfs is mkfs.ext4, which on Debian only root has in its path.
func mkfs() string {
	if path, err := exec.LookPath("mkfs.ext4"); err == nil {
		return path
	}
	return "/usr/sbin/mkfs.ext4"
}

// A port is one line between guest and host: a socket pair, of which QEMU gets the
// guest's end, so that nothing of it has a name that another guest could meet.
type port struct {
	name        string
	host, guest *os.File
	to          io.Writer // where the bytes of the guest go
}

func (m *machine) ports() (list []*port, err error) {
	all := []*port{{name: stdoutPort, to: m.stdout}, {name: controlPort}}
	if m.job.Stderr {
		all = append(all, &port{name: stderrPort, to: m.stderr})
	}
	for _, p := range all {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("socketpair: %w", err)
		}
		p.host, p.guest = os.NewFile(uintptr(fds[0]), p.name), os.NewFile(uintptr(fds[1]), p.name)
	}
	return all, nil
}

// boot runs QEMU to its end.
func (m *machine) boot(ctx context.Context, dir string, ports []*port, o *outcome) error {
	defer func() {
		for _, p := range ports {
			p.host.Close()
			p.guest.Close()
		}
	}()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var timedOut atomic.Bool
	var said, report bytes.Buffer
	cmd := exec.CommandContext(ctx, qemuProgram, m.args(dir, ports)...)
	cmd.Stdout, cmd.Stderr = &said, &said
	// Killed with this thread, which is the process's first and lives as long.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	for _, p := range ports {
		cmd.ExtraFiles = append(cmd.ExtraFiles, p.guest)
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the guest: %w", err)
	}
	var copies sync.WaitGroup
	for _, p := range ports {
		p.guest.Close() // the end of QEMU is the end of the line
		if p.name == controlPort {
			p.to = &report
			watch := time.AfterFunc(m.timeout, func() {
				timedOut.Store(true)
				fmt.Fprintln(p.host, quit)
				time.AfterFunc(quitPatience, stop)
			})
			defer watch.Stop()
		}
		copies.Go(func() {
			if _, err := io.Copy(p.to, p.host); err != nil {
				stop() // nobody reads what the guest prints
			}
		})
	}
	err := cmd.Wait()
	copies.Wait()
	o.timedOut = timedOut.Load()
	if r := new(result); json.Unmarshal(report.Bytes(), r) == nil {
		o.result = r
	}
	if o.result != nil || o.timedOut {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w: %s", qemuProgram, err, bytes.TrimSpace(said.Bytes()))
	}
	return nil
}

const qemuProgram = "qemu-system-x86_64"

// args is QEMU's command line. The guest is always emulated: where /dev/kvm is that
// of a nested hypervisor, a stock guest may hang in it.
func (m *machine) args(dir string, ports []*port) []string {
	args := []string{
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", strconv.Itoa(m.memory),
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot", "-nic", "none",
		"-serial", "file:" + filepath.Join(dir, "kernel.log"),
		"-kernel", m.kernel, "-initrd", filepath.Join(dir, "initramfs"),
		"-append", "console=ttyS0 panic=-1 reboot=t",
		"-device", "virtio-rng-pci", "-device", "virtio-serial-pci",
	}
	for _, d := range disks {
		args = append(args, "-drive", "format=raw,if=virtio,cache=unsafe,discard=unmap,file="+filepath.Join(dir, d.name))
	}
	for i, p := range ports {
		args = append(args,
			"-chardev", fmt.Sprintf("socket,id=%s,fd=%d", p.name, 3+i),
			"-device", fmt.Sprintf("virtserialport,chardev=%s,name=%s", p.name, p.name))
	}
	for _, s := range m.job.Shares {
		args = append(args, "-virtfs", "local,security_model=none,readonly=on,multidevs=remap,mount_tag="+s.Tag+",path="+s.Path)
	}
	return args
}
