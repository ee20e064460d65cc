package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// containerName is the program's name in the new process that becomes a container.
const containerName = "erofsd-container"

// Init must be the first call in main: the process may be the one that [Command]
// starts, and then Init does not return.
func Init() {
	if os.Args[0] != containerName {
		return
	}
	err := enter(os.Args[1], os.Args[2])
	if err == nil {
		err = unix.Exec(os.Args[3], os.Args[3:], []string{"PATH=/usr/bin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"})
	}
	fmt.Fprintln(os.Stderr, "container:", err)
	os.Exit(125)
}

// Command returns a command that runs argv (a path in the image first) with the
// image mounted at lower as its root: in mount, process, host name and IPC
// namespaces of its own, over an overlay whose upper directory is a tmpfs that goes
// with it, as container runtimes do. scratch is an empty directory.
func Command(ctx context.Context, lower, scratch string, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = append([]string{containerName, lower, scratch}, argv...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true,
	}
	return cmd
}

// enter makes the overlay of lower the root of this mount namespace.
func enter(lower, scratch string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	upper, work, root := filepath.Join(scratch, "upper"), filepath.Join(scratch, "work"), filepath.Join(scratch, "root")
	if err := errors.Join(os.Mkdir(upper, 0o755), os.Mkdir(work, 0o755), os.Mkdir(root, 0o755)); err != nil {
		return err
	}
	options := "lowerdir=" + lower + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", root, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount overlay: %w", err)
	}
	if err := unix.Mount("proc", filepath.Join(root, "proc"), "proc", 0, ""); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	if err := os.Chdir(root); err != nil {
		return err
	}
	// With both names the same the old root ends up above the new one, and is
	// unmounted from there (pivot_root(2)).
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount the old root: %w", err)
	}
	return os.Chdir("/")
}
