package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/erofs"
)

// Native makes the complete, uncompressed EROFS image name of tree by mkfs.erofs,
// what a lazy image is compared with.
func Native(ctx context.Context, tree, name string) error {
	part := name + ".part"
	cmd := exec.CommandContext(ctx, "mkfs.erofs", "-T", "0", "--all-root", part, tree)
	if out, err := cmd.CombinedOutput(); err != nil {
		return errors.Join(fmt.Errorf("mkfs.erofs: %w: %s", err, bytes.TrimSpace(out)), os.RemoveAll(part))
	}
	return os.Rename(part, name)
}

// MountNative mounts an image and its devices at dir without a daemon. The
// function it returns unmounts it.
func MountNative(dir, image string, devices ...string) (unmount func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := erofs.Mount(erofs.MountOptions{Source: image, Devices: devices, Target: dir}); err != nil {
		return nil, err
	}
	return func() error { return erofs.Unmount(dir, false) }, nil
}

// MountByLoop mounts an image as `mount -t erofs` does, by way of a loop device.
func MountByLoop(ctx context.Context, dir, image string) (unmount func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "mount", "-t", "erofs", "-o", "ro,loop", image, dir).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("mount %s: %w: %s", image, err, bytes.TrimSpace(out))
	}
	return func() error { return exec.Command("umount", dir).Run() }, nil
}

// MountWithoutReadahead mounts an image by way of a loop device, on which the kernel
// does not read ahead: what becomes resident is what was touched. The function it
// returns unmounts it.
func MountWithoutReadahead(ctx context.Context, dir, image string) (unmount func() error, err error) {
	out, err := exec.CommandContext(ctx, "losetup", "--find", "--show", "--read-only", image).Output()
	if err != nil {
		return nil, fmt.Errorf("losetup %s: %w", image, err)
	}
	device := strings.TrimSpace(string(out))
	detach := func() error { return exec.Command("losetup", "--detach", device).Run() }
	queue := filepath.Join("/sys/block", filepath.Base(device), "queue", "read_ahead_kb")
	err = os.MkdirAll(dir, 0o755)
	if err == nil {
		err = os.WriteFile(queue, []byte("0\n"), 0o644)
	}
	if err == nil {
		err = unix.Mount(device, dir, "erofs", unix.MS_RDONLY, "")
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s by %s: %w", image, device, err), detach())
	}
	return func() error { return errors.Join(unix.Unmount(dir, 0), detach()) }, nil
}

// ReadAll reads everything below dir by tar into a pipe and returns the bytes of
// the stream.
func ReadAll(ctx context.Context, dir string) (int64, error) {
	cmd := exec.CommandContext(ctx, "tar", "-C", dir, "-cf", "-", ".")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	n, readErr := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{out}, make([]byte, 256<<10))
	if err := cmd.Wait(); err != nil {
		return n, fmt.Errorf("tar of %s: %w: %s", dir, err, strings.TrimSpace(stderr.String()))
	}
	return n, readErr
}
