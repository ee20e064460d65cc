package daemon

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/backend"
	"github.com/erofsd/erofsd/backend/localfs"
	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/chunk"
	"github.com/erofsd/erofsd/internal/testenv"
)

// localConfig is nydus's configuration of a directory of blobs.
func localConfig(t testing.TB, id, dir string, prefetch string) json.RawMessage {
	t.Helper()
	quoted, err := json.Marshal(dir)
	if err != nil {
		t.Fatal(err)
	}
	return json.RawMessage(`{"device":{"id":"` + id + `","backend":{"type":"localfs","config":{"dir":` + string(quoted) +
		`}},"cache":{"type":"fscache"}},"mode":"direct"` + prefetch + `}`)
}

// bind makes fixture known as id.
func (d *testDaemon) bind(t testing.TB, id, fixture, prefetch string) api.BindRequest {
	t.Helper()
	dir := filepath.Join(testenv.Fixtures(t), fixture)
	r := api.BindRequest{
		ID: id, DomainID: "team", Bootstrap: filepath.Join(dir, "image.boot"),
		Config: localConfig(t, "of-"+id, filepath.Join(dir, "blobs"), prefetch),
	}
	if err := d.BindImage(t.Context(), r); err != nil {
		t.Fatalf("%v\n%s", err, d.log)
	}
	return r
}

// An image that is bound is mounted by its name, outlives its unbinding while it is
// mounted, and leaves nothing behind when it is removed.
func TestBind(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := d.bind(t, "one", "zstd", "")
	if err := d.BindImage(t.Context(), r); err != nil {
		t.Errorf("the same again: %v", err)
	}
	other := r
	other.Bootstrap = filepath.Join(testenv.Fixtures(t), "none", "image.boot")
	if err := d.BindImage(t.Context(), other); status(err) != http.StatusConflict {
		t.Errorf("another bootstrap by the same name: %v", err)
	}
	m := d.mount(t, api.MountRequest{Image: "one", DomainID: "team"})
	tree := fixtureList(t)
	compareTree(t, tree, m)
	if err := d.UnbindImage(t.Context(), api.ImageRequest{Image: "one", DomainID: "team"}); err != nil {
		t.Fatal(err)
	}
	if err := d.UnbindImage(t.Context(), api.ImageRequest{Image: "one", DomainID: "team"}); status(err) != http.StatusNotFound {
		t.Errorf("unbinding it twice: %v", err)
	}
	compareTree(t, tree, m)
	if err := d.BindImage(t.Context(), other); status(err) != http.StatusConflict {
		t.Errorf("another bootstrap while the first is mounted: %v", err)
	}
	u, err := d.Usage(t.Context(), api.ImageRequest{Image: "one", DomainID: "team"})
	if err != nil || u.Disk == 0 || u.Present != u.Total || len(u.Blobs) != 1 {
		t.Errorf("usage %+v, %v", u, err)
	}
	d.umount(t, m)
	d.remove(t, api.RemoveRequest{Image: "one", DomainID: "team"})
	if left := cachedFiles(t, d.root); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// What is pinned stays so over mounts and bindings, until it is not wanted any more.
func TestPin(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	r := d.bind(t, "one", "zstd", "")
	kept := func() bool {
		st, err := d.Status(t.Context())
		if err != nil || len(st.Kept) != 1 {
			t.Fatalf("%+v, %v", st.Kept, err)
		}
		return st.Kept[0].Pinned
	}
	pin := api.PinRequest{Image: "one", DomainID: "team", Pinned: true}
	if err := d.Pin(t.Context(), pin); err != nil || !kept() {
		t.Fatalf("pinned %v, %v", kept(), err)
	}
	m := d.mount(t, api.MountRequest{Image: "one", DomainID: "team"})
	d.umount(t, m)
	if err := d.UnbindImage(t.Context(), api.ImageRequest{Image: "one", DomainID: "team"}); err != nil {
		t.Fatal(err)
	}
	if err := d.BindImage(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if !kept() {
		t.Error("a mount or a binding took the pin away")
	}
	pin.Pinned = false
	if err := d.Pin(t.Context(), pin); err != nil || kept() {
		t.Errorf("not pinned any more: %v, %v", !kept(), err)
	}
	pin.Image = "nobody"
	if err := d.Pin(t.Context(), pin); status(err) != http.StatusNotFound {
		t.Errorf("an unknown image: %v", err)
	}
	// There is a record outside of the daemon's directory.
	if err := os.WriteFile(filepath.Join(d.root, "one.json"), []byte(`{"blobs":[]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"../one", "../../one", "a/../../one"} {
		pin.Image, pin.DomainID = name, ""
		if err := d.Pin(t.Context(), pin); status(err) != http.StatusBadRequest {
			t.Errorf("pin %s: %v", name, err)
		}
		if _, err := d.Usage(t.Context(), api.ImageRequest{Image: name}); status(err) != http.StatusBadRequest {
			t.Errorf("usage of %s: %v", name, err)
		}
	}
}

// A name may go to another bootstrap once nobody has the first: nothing of that is left.
func TestBindAnother(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	d.bind(t, "name", "zstd", "")
	m := d.mount(t, api.MountRequest{Image: "name", DomainID: "team"})
	compareTree(t, fixtureList(t), m)
	d.umount(t, m)
	if err := d.UnbindImage(t.Context(), api.ImageRequest{Image: "name", DomainID: "team"}); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(testenv.Fixtures(t), "layered")
	r := api.BindRequest{
		ID: "name", DomainID: "team", Bootstrap: filepath.Join(dir, "image.boot"),
		Config: localConfig(t, "x", filepath.Join(dir, "blobs"), ""),
	}
	await(t, "the end of the first image", func() bool {
		err := d.BindImage(t.Context(), r)
		if err != nil && status(err) != http.StatusConflict {
			t.Fatal(err)
		}
		return err == nil
	})
	m = d.mount(t, api.MountRequest{Image: "name", DomainID: "team"})
	compareTree(t, testenv.LoadTree(t, "layered.jsonl"), m)
}

func TestBindRefused(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	good := d.bind(t, "good", "zstd", "")
	torn := filepath.Join(t.TempDir(), "torn.boot")
	p, err := os.ReadFile(good.Bootstrap)
	if err == nil {
		err = os.WriteFile(torn, p[:len(p)/2], 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	const secret = "c2VjcmV0OnNlY3JldA=="
	for name, change := range map[string]func(*api.BindRequest){
		"no bootstrap":      func(r *api.BindRequest) { r.Bootstrap += "-missing" },
		"a directory":       func(r *api.BindRequest) { r.Bootstrap = filepath.Dir(r.Bootstrap) },
		"a torn bootstrap":  func(r *api.BindRequest) { r.Bootstrap = torn },
		"no name":           func(r *api.BindRequest) { r.ID = "" },
		"a path as name":    func(r *api.BindRequest) { r.ID = "../x" },
		"a long name":       func(r *api.BindRequest) { r.ID = strings.Repeat("x", 201) },
		"a path as domain":  func(r *api.BindRequest) { r.DomainID = "a/b" },
		"no configuration":  func(r *api.BindRequest) { r.Config = nil },
		"an unknown type":   func(r *api.BindRequest) { r.Config = []byte(strings.Replace(string(r.Config), "localfs", "floppy", 1)) },
		"a broken document": func(r *api.BindRequest) { r.Config = []byte(`{"device": "` + secret + `"}`) },
	} {
		t.Run(name, func(t *testing.T) {
			r := good
			r.ID = "bad"
			change(&r)
			if err := d.BindImage(t.Context(), r); status(err) != http.StatusBadRequest || strings.Contains(err.Error(), secret) {
				t.Errorf("got %v", err)
			}
		})
	}
	if left := cachedFiles(t, d.root); len(left) != 2 { // the good one's bootstrap and record
		t.Errorf("left behind: %q", left)
	}
}

// Prefetch brings what it was asked for, and nothing else.
func TestPrefetch(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	never := `,"fs_prefetch":{"enable":false}`
	d.bind(t, "one", "zstd", never)
	m := d.mount(t, api.MountRequest{Image: "one", DomainID: "team"})
	if err := d.Prefetch(t.Context(), api.PrefetchRequest{Image: "one", DomainID: "team", Files: []string{"/no/such/file"}}); status(err) != http.StatusNotFound {
		t.Errorf("a file that is not there: %v", err)
	}
	if n := d.image(t, m).BytesPresent; n != 0 {
		t.Fatalf("%d bytes are present before anybody asked", n)
	}
	name, size := largest(t)
	if err := d.Prefetch(t.Context(), api.PrefetchRequest{Image: "one", DomainID: "team", Files: []string{name}}); err != nil {
		t.Fatal(err)
	}
	await(t, "the file", func() bool { return d.image(t, m).BytesPresent >= size })
	if i := d.image(t, m); i.KernelEvents != 0 || i.BytesPresent > size+1<<20 {
		t.Errorf("%d events, %d bytes present for a file of %d", i.KernelEvents, i.BytesPresent, size)
	}
	if err := d.Prefetch(t.Context(), api.PrefetchRequest{Image: "one", DomainID: "team", Files: []string{"/"}}); err != nil {
		t.Fatal(err)
	}
	await(t, "everything", func() bool { i := d.image(t, m); return i.BytesPresent == i.BytesTotal })
	compareTree(t, fixtureList(t), m)
}

// largest returns the path and size of the fixtures' largest file.
func largest(t testing.TB) (name string, size int64) {
	t.Helper()
	for path, n := range fixtureList(t) {
		if n.Size > size {
			name, size = path, n.Size
		}
	}
	return name, size
}

// With fs_prefetch an image is complete though nobody reads it.
func TestPrefetchEnabled(t *testing.T) {
	d := startDaemon(t, daemonOptions{})
	d.bind(t, "one", "batch", `,"fs_prefetch":{"enable":true,"threads_count":2}`)
	m := d.mount(t, api.MountRequest{Image: "one", DomainID: "team"})
	await(t, "completion", func() bool { return d.image(t, m).Complete })
	if n := d.image(t, m).KernelEvents; n != 0 {
		t.Errorf("%d events", n)
	}
	compareTree(t, fixtureList(t), m)
}

// A chunk table beside the bootstrap spares the request for it; a damaged one is ignored.
func TestBindSideTable(t *testing.T) {
	fixture := filepath.Join(testenv.Fixtures(t), "zstd")
	f, err := os.Open(filepath.Join(fixture, "image.boot"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, _, err := openImage(t.Context(), f)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := blobEntries(m)
	if err != nil || len(entries) != 1 {
		t.Fatalf("%d blobs, %v", len(entries), err)
	}
	e := entries[0]
	store, err := localfs.New(filepath.Join(fixture, "blobs"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := store.Open(t.Context(), backend.Ref{Digest: digest.NewDigestFromEncoded(digest.SHA256, e.ID)})
	if err != nil {
		t.Fatal(err)
	}
	table, err := chunk.ReadTable(t.Context(), b, e)
	if err = errors.Join(err, b.Close()); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		table []byte
		fails bool
	}{
		"right":   {table.Marshal(), false},
		"damaged": {table.Marshal()[1:], true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			boot := filepath.Join(dir, "image.boot")
			p, err := os.ReadFile(f.Name())
			if err == nil {
				err = errors.Join(os.WriteFile(boot, p, 0o600), os.WriteFile(filepath.Join(dir, e.ID+".blob.meta"), tc.table, 0o600))
			}
			if err != nil {
				t.Fatal(err)
			}
			d := startDaemon(t, daemonOptions{})
			r := api.BindRequest{ID: "one", Bootstrap: boot, Config: localConfig(t, "x", t.TempDir(), "")} // without blobs
			if err := d.BindImage(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			_, err = d.Mount(t.Context(), api.MountRequest{Image: "one", Mountpoint: newMountpoint(t)})
			if (err != nil) != tc.fails {
				t.Errorf("mount: %v", err)
			}
		})
	}
}
