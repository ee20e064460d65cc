package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/erofs"
)

// helperName is argv[0] of the short-lived process that calls mount(2) and
// umount(2). It holds none of the kernel's fds: a daemon that was killed inside
// its own mount of an on-demand image could leave a process that never dies
// (kernel-protocols, invariant 3).
const helperName = "erofsd-mount"

// Descriptors of the helper, after standard input, output and error.
const (
	helperTargetFD = 3
	helperBootFD   = 4
	helperDeviceFD = 5 // and on, one per device slot
)

// helperResult is what the helper prints: nothing went wrong when Error is empty.
type helperResult struct {
	Error string        `json:"error,omitempty"`
	Errno syscall.Errno `json:"errno,omitempty"`
}

// IsHelper says that this process was started by a daemon as its helper, or as its
// mounter; main calls [Helper] then and nothing else.
func IsHelper(args []string) bool {
	return len(args) > 0 && (args[0] == helperName || args[0] == mounterName)
}

// Helper runs the helper process and returns the exit code. A helper prints a helperResult.
func Helper(args []string, out io.Writer) int {
	if args[0] == mounterName {
		return runMounter(args[1:])
	}
	var res helperResult
	if err := helperRun(args[1:]); err != nil {
		res.Error = err.Error()
		errors.As(err, &res.Errno)
	}
	if err := json.NewEncoder(out).Encode(res); err != nil || res.Error != "" {
		return 1
	}
	return 0
}

func helperRun(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("%s: want an operation and its arguments", helperName)
	}
	operation, args := args[0], args[1:]
	switch {
	case operation == "mount-files" && len(args) == 2: // BOOTSTRAP DEVICES
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return fmt.Errorf("%s: number of devices: %w", helperName, err)
		}
		return helperMount(n, args[0])
	case operation == "mount-fscache" && len(args) >= 3: // BOOTSTRAP FSID DOMAIN COOKIE...
		source := args[0] // only shown
		if len(source) > erofs.MaxMountValue {
			source = args[1]
		}
		return erofs.Mount(erofs.MountOptions{
			Source: source, FSID: args[1], Domain: args[2], Devices: args[3:], TargetFD: helperTargetFD,
		})
	case operation == "clone" && len(args) == 2: // PATH MAJOR:MINOR
		return erofs.Clone(args[0], args[1], helperTargetFD)
	case operation == "unmount" && len(args) == 1: // PATH
		return helperUnmount(args[0], false)
	case operation == "detach" && len(args) == 1: // PATH
		return helperUnmount(args[0], true)
	default:
		return fmt.Errorf("%s: unknown operation %s %q", helperName, operation, args)
	}
}

// helperMount mounts from the descriptors. boot is the bootstrap's path in the
// daemon's own directory; where it is not too long for the kernel it is used
// instead of the descriptor, so that the table of mounts says whose mount it is.
func helperMount(devices int, boot string) error {
	if len(boot) > erofs.MaxMountValue {
		boot = fdPath(helperBootFD)
	}
	o := erofs.MountOptions{Source: boot, TargetFD: helperTargetFD}
	for i := range devices {
		o.Devices = append(o.Devices, fdPath(helperDeviceFD+i))
	}
	return erofs.Mount(o)
}

// helperUnmount unmounts what is at point, the name that the table of mounts has, in which
// there is no symbolic link: nobody who can make one may choose what is unmounted.
func helperUnmount(point string, detach bool) error {
	if err := enterDir(filepath.Dir(point)); err != nil {
		return &os.PathError{Op: "unmount", Path: point, Err: err}
	}
	return erofs.Unmount(filepath.Base(point), detach)
}

// enterDir makes dir, an absolute name without symbolic links, the working directory: step
// by step, because systemd's RestrictSUIDSGID= takes openat2 away.
func enterDir(dir string) error {
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	for _, name := range strings.FieldsFunc(dir, func(r rune) bool { return r == '/' }) {
		fd, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		if err := errors.Join(unix.Fchdir(fd), unix.Close(fd)); err != nil {
			return err
		}
	}
	return nil
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// runHelper starts the helper with files as its descriptors 3 and on, waits for
// it, and returns the error it reports; errors.Is finds its errno. The helper has gate, of
// enterGate, until it has ended. With ctx it is killed, and waited for.
func runHelper(ctx context.Context, gate *os.File, files []*os.File, args ...string) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = append([]string{helperName}, args...)
	cmd.ExtraFiles = append(slices.Clone(files), gate)
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off"} // it lives for milliseconds
	out, err := cmd.Output()
	var res helperResult
	if jerr := json.Unmarshal(out, &res); jerr != nil {
		return fmt.Errorf("run %s %s: %w", helperName, args[0], errors.Join(err, jerr))
	}
	if res.Error == "" {
		return nil
	}
	return &helperError{res}
}

// helperError carries a helper's error across the process boundary.
type helperError struct{ helperResult }

func (e *helperError) Error() string { return e.helperResult.Error }

func (e *helperError) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}
