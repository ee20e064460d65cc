package containerd

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// seed is what the images are made from.
const seed = 7

// manyLayers is how many layers one of the images has: containerd's limit for overlayfs.
const manyLayers = 128

// A world is programs and images.
type world struct {
	dir     string // short: sockets are in it
	bin     string
	mode    string // of the snapshotter's daemon; "": start
	runtime services.Runtime
	front   *front
	addr    string // of the registry, by way of front
	private string // the same registry for who logs in
	lazy    string // references
	again   string // the manifest of lazy by another name
	other   string // lazy too; it shares the data of lazy
	plain   string
	deep    string // ordinary, with many layers
	volume  string // lazy, and says that /data is a volume
	pause   string // what a pod's sandbox runs
	want    string // what check prints in a container of any of them but pause
}

// newWorld makes it, below Debian's containerd, or skips t where it cannot be.
func newWorld(t *testing.T) *world {
	t.Helper()
	testenv.Root(t)
	dir, err := os.MkdirTemp("", "ectr-*")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o711); err != nil { // as containerd's own: root of another user namespace passes
		t.Fatal(err)
	}
	testenv.Kernel(t, "fanotify", fanotify.Supported(dir))
	testenv.Kernel(t, "file-backed erofs", erofs.Supported(dir))
	w := &world{dir: dir, bin: filepath.Join(dir, "bin"), runtime: services.Containerd(t)}
	content := filepath.Join(dir, "registry")
	w.front = newFront(t, services.Registry(t, services.RegistryOptions{Dir: content}).Addr)
	w.addr = w.front.addr
	w.private = services.Registry(t, services.RegistryOptions{Dir: content, Login: true}).Addr
	w.build(t, w.bin+"/", "./cmd/containerd-erofsd-grpc", "./cmd/erofsd")
	w.images(t)
	return w
}

// below is the same world below another containerd.
func (w *world) below(runtime services.Runtime) *world {
	other := *w
	other.runtime = runtime
	return &other
}

// embedded is the same world with one program, which is erofsd too.
func (w *world) embedded(t *testing.T) *world {
	t.Helper()
	other := *w
	other.bin, other.mode = filepath.Join(w.dir, "one"), "embedded"
	err := os.Mkdir(other.bin, 0o755)
	if err == nil {
		err = os.Link(filepath.Join(w.bin, snapshotterProgram), filepath.Join(other.bin, snapshotterProgram))
	}
	if err != nil {
		t.Fatal(err)
	}
	return &other
}

// build builds packages of this module.
func (w *world) build(t *testing.T, out string, packages ...string) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"build", "-o", out}, packages...)...)
	cmd.Dir = testenv.ModuleRoot(t)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
}

// images makes the images.
func (w *world) images(t *testing.T) {
	t.Helper()
	program, files := w.app(t)
	w.lazy, w.plain = w.addr+"/app:lazy", w.addr+"/app:plain"
	app := imageOf(t, ocispec.ImageConfig{}, program, files)
	w.again = w.addr + "/app:again"
	w.convert(t, app.layout(t), w.lazy)
	w.convert(t, app.layout(t), w.again)
	w.push(t, app, w.plain)

	w.other = w.addr + "/other/app:lazy"
	w.convert(t, imageOf(t, ocispec.ImageConfig{}, program, files, layerWith(t, "other", "another image")).layout(t), w.other)

	w.volume = w.addr + "/volume:lazy"
	w.convert(t, imageOf(t, ocispec.ImageConfig{Volumes: map[string]struct{}{"/data": {}}}, program, files).layout(t), w.volume)

	w.pause = w.addr + "/pause:1"
	w.push(t, imageOf(t, ocispec.ImageConfig{Entrypoint: []string{"/bin/check", "pause"}}, program), w.pause)

	w.deep = w.addr + "/deep:plain"
	layers := []layer{program, files}
	for i := len(layers); i < manyLayers; i++ {
		layers = append(layers, layerWith(t, fmt.Sprintf("deep/%03d", i), fmt.Sprint("layer ", i)))
	}
	w.push(t, imageOf(t, ocispec.ImageConfig{}, layers...), w.deep)
}

// app makes the layers of the application: check, and what that reads.
func (w *world) app(t *testing.T) (program, files layer) {
	t.Helper()
	src := filepath.Join(w.dir, "src")
	w.build(t, filepath.Join(src, "program", "bin", "check"), "./kernel-tests/containerd/testdata/check")
	w.want = data(t, filepath.Join(src, "files"))
	return layerOf(t, filepath.Join(src, "program")), layerOf(t, filepath.Join(src, "files"))
}

// data makes 8 MB in dir that do not compress, and returns what check prints of them.
func data(t *testing.T, dir string) (want string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, "data"), 0o755); err != nil {
		t.Fatal(err)
	}
	all, rnd := sha256.New(), rand.NewChaCha8([32]byte{seed})
	for i := range 40 {
		p := make([]byte, 200_000+1_000*i)
		_, _ = rnd.Read(p) // never fails
		name := fmt.Sprintf("/data/%02d", i)
		if err := os.WriteFile(filepath.Join(dir, name), p, 0o644); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(all, "%s %x\n", name, sha256.Sum256(p))
	}
	return fmt.Sprintf("read %x\n", all.Sum(nil))
}

// tail is the end of a log.
func tail(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}
