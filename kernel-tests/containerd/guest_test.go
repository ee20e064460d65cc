package containerd

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/daemon"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/guestkernel"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// What the host has made for a guest.
const (
	envGuestDir  = "CONTAINERD_GUEST_DIR"
	envGuestWant = "CONTAINERD_GUEST_WANT"
)

// TestGuests pulls, runs and removes a lazy image in guests whose kernels have cachefiles and
// no fanotify that would do: with this machine's containerd, runc and docker-registry. The test
// runs on the host and in the guests.
func TestGuests(t *testing.T) {
	if os.Getenv("EROFSD_GUEST") != "" {
		inGuest(t)
		return
	}
	testenv.Root(t)
	for _, tool := range []string{"go", "mkfs.ext4", "qemu-system-x86_64"} {
		testenv.Tool(t, tool)
	}
	dir := t.TempDir()
	w := &world{dir: dir, bin: filepath.Join(dir, "bin"), runtime: services.Containerd(t)}
	w.addr = services.Registry(t, services.RegistryOptions{Dir: filepath.Join(dir, "content")}).Addr
	w.build(t, w.bin+"/", "./cmd/containerd-erofsd-grpc", "./cmd/erofsd")
	vm, self := filepath.Join(dir, "vm"), filepath.Join(dir, "containerd.test")
	w.build(t, vm, "./kernel-tests/vm")
	w.buildTest(t, self)
	program, files := w.app(t)
	w.convert(t, imageOf(t, ocispec.ImageConfig{}, program, files).layout(t), w.addr+"/app:lazy")
	for _, row := range guestkernel.Rows {
		t.Run(row, func(t *testing.T) {
			_, err := guestkernel.Find(t.Context(), row)
			if errors.Is(err, fs.ErrNotExist) {
				testenv.Need(t, "kernel-"+row, "needs the guest kernel "+row+": make kernel builds it")
			}
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), vm, "-kernel", row, "-timeout", "10m", "-share", "/usr", "-share", dir,
				"-env", envGuestDir+"="+dir, "-env", envGuestWant+"="+strings.TrimSpace(w.want), self, "-test.v", "-test.timeout=9m", "-test.run=^TestGuests$")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v\n%s", err, &out)
			}
			for line := range strings.Lines(out.String()) {
				if strings.Contains(line, "_test.go:") {
					t.Log(strings.TrimSpace(line))
				}
			}
		})
	}
}

// buildTest builds this package's tests as a program that needs no libraries.
func (w *world) buildTest(t *testing.T, out string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", out, "./kernel-tests/containerd")
	cmd.Dir = testenv.ModuleRoot(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if said, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, said)
	}
}

// inGuest is the test in a guest.
func inGuest(t *testing.T) {
	if err := furnish(); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(os.Getenv("EROFSD_TEST_DIR"), "c-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	made := os.Getenv(envGuestDir)
	w := &world{dir: dir, bin: filepath.Join(made, "bin"), runtime: services.Containerd(t), want: os.Getenv(envGuestWant) + "\n"}
	w.addr = services.Registry(t, services.RegistryOptions{Dir: filepath.Join(made, "content")}).Addr
	w.lazy = w.addr + "/app:lazy"
	for _, w.mode = range []string{"start", "embedded"} {
		t.Run(w.mode, w.byCachefiles)
	}
}

// byCachefiles pulls the image and runs it, first in a container that has read nothing when
// erofsd is killed and replaced.
func (w *world) byCachefiles(t *testing.T) {
	n := w.start(t)
	ctx := in(t, "default")
	image := n.pull(ctx, t, w.lazy, false)
	if n.dataPulled(ctx, t, image) {
		t.Error("the layer with data was pulled")
	}
	c := n.waiting(ctx, t, image, "waits")
	n.killDaemon(ctx, t)
	n.upgradeDaemon(ctx, t)
	n.finished(ctx, t, c)
	n.check(ctx, t, image, "another")
	st, err := n.daemon.Status(ctx)
	if err != nil || st.Transport != daemon.Cachefiles || len(st.Images) != 1 || st.Kernel.Events == 0 {
		t.Errorf("the daemon says %+v, %v", st, err)
	}
	t.Logf("pulled and run by %s: %d requests of the kernel", st.Transport, st.Kernel.Events)
	n.remove(ctx, t, w.lazy)
	n.empty(ctx, t)
}

// furnish makes the guest a place for programs of the host, which have libraries, and for runc:
// no container can leave (pivot_root(2)) the file system that the kernel booted from, so that is
// bound over itself.
func furnish() error {
	for _, name := range []string{"lib", "lib64"} {
		if err := os.Symlink("usr/"+name, "/"+name); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	const root = "/root-again"
	err := os.MkdirAll(root, 0o755)
	if err == nil {
		err = unix.Mount("/", root, "", unix.MS_BIND|unix.MS_REC, "")
	}
	if err == nil {
		err = os.Chdir(root)
	}
	if err == nil {
		err = unix.Mount(root, "/", "", unix.MS_MOVE, "")
	}
	if err == nil {
		err = unix.Chroot(".")
	}
	if err == nil {
		err = os.Chdir("/")
	}
	if err != nil {
		return fmt.Errorf("make a root directory that runc can leave: %w", err)
	}
	return nil
}
