package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
)

// A mountRig is a mounter with a directory of images, and things that are not its worker's.
type mountRig struct {
	*mounterProcess
	t           *testing.T
	dir, images string
}

// newMountRig starts a mounter that mounts below the named directory of the rig alone, if
// there is one.
func newMountRig(t *testing.T, below ...string) *mountRig {
	t.Helper()
	r := &mountRig{t: t, dir: newRoot(t)}
	r.images = filepath.Join(r.dir, "images")
	if err := os.Mkdir(r.images, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"images/a.boot", "images/b.boot", "images/other", "outside.boot"} {
		if err := os.WriteFile(filepath.Join(r.dir, name), make([]byte, 4096), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(os.Mkdir(r.path("point"), 0o700), os.Symlink("../outside.boot", r.path("images/link.boot"))); err != nil {
		t.Fatal(err)
	}
	var err error
	for i := range below {
		below[i] = r.path(below[i])
	}
	if r.mounterProcess, err = startMounter(r.images, below...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *mountRig) path(name string) string { return filepath.Join(r.dir, name) }

// files opens what names say: a directory as a mount point is opened.
func (r *mountRig) files(names ...string) (files []*os.File) {
	for _, name := range names {
		fd, err := syscall.Open(r.path(name), oPath|syscall.O_CLOEXEC, 0)
		if err != nil {
			r.t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), name)
		r.t.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
	return files
}

// TestMounterRefuses: whoever has become the worker mounts and unmounts nothing but images.
func TestMounterRefuses(t *testing.T) {
	testenv.Root(t)
	r := newMountRig(t)
	other := r.path("tmpfs")
	if err := errors.Join(os.Mkdir(other, 0o700), syscall.Mount("x", other, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	defer syscall.Unmount(other, 0)
	for name, tc := range map[string]struct {
		files []string
		args  []string
		want  string
	}{
		"nothing":               {nil, nil, "a call of"},
		"another operation":     {nil, []string{"remount", "/"}, "unknown operation"},
		"unmount another":       {nil, []string{"unmount", other}, "not an image"},
		"detach another":        {nil, []string{"detach", other}, "not an image"},
		"detach all":            {nil, []string{"detach", "/"}, "not an image"},
		"unmount nothing":       {nil, []string{"unmount", r.path("point")}, "invalid argument"},
		"clone another":         {[]string{"point"}, []string{"clone", other, "0:1"}, "not an image"},
		"bootstrap elsewhere":   {[]string{"point", "outside.boot"}, []string{"mount-files", r.path("outside.boot"), "0"}, "no bootstrap in"},
		"bootstrap by ..":       {[]string{"point", "outside.boot"}, []string{"mount-files", r.images + "/../outside.boot", "0"}, "no bootstrap in"},
		"bootstrap by link":     {[]string{"point", "outside.boot"}, []string{"mount-files", r.path("images/link.boot"), "0"}, "another file"},
		"another bootstrap":     {[]string{"point", "images/b.boot"}, []string{"mount-files", r.path("images/a.boot"), "0"}, "another file"},
		"not a bootstrap":       {[]string{"point", "images/other"}, []string{"mount-files", r.path("images/other"), "0"}, "no bootstrap in"},
		"target is a file":      {[]string{"images/b.boot", "images/a.boot"}, []string{"mount-files", r.path("images/a.boot"), "0"}, "no directory"},
		"device is a directory": {[]string{"point", "images/a.boot", "point"}, []string{"mount-files", r.path("images/a.boot"), "1"}, "no regular file"},
		"too few devices":       {[]string{"point", "images/a.boot"}, []string{"mount-files", r.path("images/a.boot"), "1"}, "with 2 descriptors"},
		"fscache elsewhere":     {[]string{"point"}, []string{"mount-fscache", r.path("outside.boot"), "f", "d"}, "no bootstrap in"},
		"fscache and a file":    {[]string{"point", "point"}, []string{"mount-fscache", r.path("images/a.boot"), "f", "d"}, "no mount point"},
		"too many files":        {[]string{"point"}, []string{"unmount", other}, "not an image"},
	} {
		err := r.run(t.Context(), r.files(tc.files...), tc.args...)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
	// What is allowed reaches the kernel, which says what is wrong with the image.
	err := r.run(t.Context(), r.files("point", "images/a.boot"), "mount-files", r.path("images/a.boot"), "0")
	if err == nil || !strings.Contains(err.Error(), "mount "+r.path("images/a.boot")) || errnoOf(err) == 0 {
		t.Errorf("an empty image: %v", err)
	}
}

// TestMountBelow: an image is mounted only where it may be.
func TestMountBelow(t *testing.T) {
	testenv.Root(t)
	r := newMountRig(t, "missing", "link")
	if err := errors.Join(os.MkdirAll(r.path("point/deep"), 0o700), os.Mkdir(r.path("pointed"), 0o700), os.Symlink("point", r.path("link"))); err != nil {
		t.Fatal(err)
	}
	for _, place := range []string{"point", "point/deep", "pointed", "images", "."} {
		err := r.run(t.Context(), r.files(place, "images/a.boot"), "mount-files", r.path("images/a.boot"), "0")
		refused := err != nil && strings.Contains(err.Error(), "mount_below")
		if allowed := strings.HasPrefix(place+"/", "point/"); refused == allowed || err == nil {
			t.Errorf("%s: %v", place, err) // an empty image is an error where it is allowed
		}
	}
}

func errnoOf(err error) (errno syscall.Errno) {
	errors.As(err, &errno)
	return errno
}

// TestMounterHostile: what is no call ends that call alone.
func TestMounterHostile(t *testing.T) {
	r := newMountRig(t)
	for name, bytes := range map[string][]byte{
		"nothing":       {},
		"half a length": {1, 0},
		"large":         {0xff, 0xff, 0xff, 0xff},
		"no JSON":       {3, 0, 0, 0, 'a', 'b', 'c'},
		"many files":    append([]byte{24, 0, 0, 0}, `{"args":[],"files":99999}`[:24]...),
		"fewer files":   append([]byte{21, 0, 0, 0}, `{"args":[],"files":3}`...),
	} {
		ours, theirs, err := socketPair(unix.SOCK_STREAM)
		var gate *os.File
		if err == nil {
			gate, err = enterGate(r.images)
		}
		if err == nil {
			err = errors.Join(sendFiles(r.control, []*os.File{theirs, gate}), theirs.Close(), gate.Close())
		}
		if err == nil {
			_, err = ours.Write(bytes)
		}
		if err == nil {
			err = errors.Join(ours.CloseWrite(), ours.SetReadDeadline(time.Now().Add(20*time.Second)))
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := end(ours); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		ours.Close()
	}
	if err := r.run(t.Context(), nil, "unmount", r.path("point")); errnoOf(err) != syscall.EINVAL {
		t.Errorf("the next call: %v", err)
	}
}

// end reads until the other side closes.
func end(c *net.UnixConn) error {
	for p := make([]byte, 4096); ; {
		if _, err := c.Read(p); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return err
			}
			return nil
		}
	}
}

// TestMounterMany: more calls than helpers are all answered, and those that are given up end.
func TestMounterMany(t *testing.T) {
	r := newMountRig(t)
	var wg sync.WaitGroup
	errs := make(chan error, 3*maxHelpers)
	for i := range cap(errs) {
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if i%3 == 0 {
				cancel()
			}
			err := r.run(ctx, nil, "unmount", r.path("point"))
			if i%3 == 0 && errors.Is(err, context.Canceled) || errnoOf(err) == syscall.EINVAL {
				err = nil
			}
			errs <- err
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestMounterDies: calls fail, with what to do.
func TestMounterDies(t *testing.T) {
	r := newMountRig(t)
	if err := r.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-r.gone
	err := r.run(t.Context(), nil, "unmount", r.path("point"))
	if !errors.Is(err, errMounterGone) {
		t.Error(fmt.Errorf("got %w, want what to do", err))
	}
}
