package snapshotter

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/internal/api"
)

// TestCrashes pulls, runs and removes images at random while the snapshotter is killed: at any
// time, and before and after each of its calls to the daemon. What was told to be done stays done;
// nothing is taken from the daemon that a snapshot has used; usage is what the daemon has; and in
// the end nothing is left of anything. SEED chooses another run.
func TestCrashes(t *testing.T) {
	seed := rand.Uint64()
	if s, err := strconv.ParseUint(os.Getenv("SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("SEED=%d", seed)
	m := newModel(t, seed)
	for range 250 {
		m.step(t)
	}
	t.Logf("%d crashes, at %v", m.crashes, m.places)
	m.removeAll(t)
}

// A model is what should be.
type model struct {
	rnd    *rand.Rand
	root   string
	dir    string
	daemon *fakeDaemon
	child  *child
	images []modelImage

	names map[string]string // parents by snapshot
	base  int64             // usage of an image that was never mounted

	mu      sync.Mutex      // guards what follows
	used    map[string]bool // committed bootstraps of which a container was made
	doubt   string          // the snapshot that is being removed
	kill    int             // calls of the daemon until the process is killed; 0: not
	crashes int
	places  map[string]int
	wrong   []string
}

// A modelImage is one with a content; several of them share blobs.
type modelImage struct {
	id, file, text string
	usage          api.Usage
}

func newModel(t *testing.T, seed uint64) *model {
	t.Helper()
	m := &model{
		rnd: rand.New(rand.NewPCG(seed, 0)), dir: t.TempDir(), daemon: newFake(t),
		names: map[string]string{}, used: map[string]bool{}, places: map[string]int{},
	}
	m.root = filepath.Join(m.dir, "root")
	m.daemon.usages = map[string]api.Usage{}
	for i, blobs := range [][]string{{"a", "b"}, {"b", "c"}, {"c"}} {
		image := modelImage{text: fmt.Sprint("image ", i), file: filepath.Join(m.dir, fmt.Sprint(i)), usage: usageOf(blobs...)}
		boot := bootstrapOf(t, image.text)
		if err := os.WriteFile(image.file, boot, 0o600); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(boot)
		image.id = hex.EncodeToString(sum[:])
		m.daemon.usages[keyOf("", image.id)] = image.usage
		m.images = append(m.images, image)
	}
	l, err := net.Listen("unix", filepath.Join(m.dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: api.Handler(served{Service: api.NewClient("nobody"), d: m.daemon, at: m.at})}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l) // until Close
	}()
	t.Cleanup(func() {
		if m.child != nil {
			m.child.end()
		}
		if err := errors.Join(server.Close(), m.daemon.end()); err != nil {
			t.Error(err)
		}
		<-done
	})
	m.start(t)
	return m
}

// at is told of each call of the daemon's, and kills the process that makes it when it is its time.
func (m *model) at(call, image string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if call == "before unbind" || call == "before remove" {
		for boot := range m.used {
			if m.imageOf(boot).id == image && boot != m.doubt {
				m.wrong = append(m.wrong, fmt.Sprintf("%s of the image of %s, which is there", call, boot))
			}
		}
	}
	if m.kill == 0 {
		return
	}
	if m.kill--; m.kill == 0 {
		m.places[call]++
		m.child.kill()
	}
}

// imageOf is the image of a bootstrap's snapshot or of a layer with data: boot-IMAGE-VARIANT.
func (m *model) imageOf(name string) modelImage {
	i, _ := strconv.Atoi(strings.Split(name, "-")[1])
	return m.images[i]
}

// step gives an order, often to a process that is killed meanwhile or later, and compares.
func (m *model) step(t *testing.T) {
	t.Helper()
	o := m.choose()
	m.mu.Lock()
	m.doubt = ""
	if o.Do == "remove" {
		m.doubt = o.Key
	}
	m.mu.Unlock()
	var end bool
	switch m.rnd.IntN(6) {
	case 0: // at any time
		kill := time.AfterFunc(time.Duration(m.rnd.IntN(4000))*time.Microsecond, m.child.kill)
		defer kill.Stop()
	case 1: // in what it does by itself
		end = true
	case 2: // before or after one of the next calls of the daemon's, in this order or a later one
		m.mu.Lock()
		m.kill = 1 + m.rnd.IntN(4)
		m.mu.Unlock()
	}
	a, err := m.child.do(o)
	if err != nil {
		m.crashed(t, o)
	} else {
		m.done(t, o, a)
	}
	if end {
		m.child.kill()
	}
	if !m.check(t) {
		m.crashed(t, order{})
	}
}

// choose returns an order that can be carried out.
func (m *model) choose() order {
	image, variant := m.rnd.IntN(len(m.images)), m.rnd.IntN(2)
	boot := fmt.Sprintf("boot-%d-%d", image, variant)
	_, there := m.names[boot]
	switch n := m.rnd.IntN(10); {
	case !there && n < 6:
		return order{Do: "pull", Key: boot, Parent: fmt.Sprintf("data-%d", image), Bootstrap: m.images[image].file}
	case there && n < 4:
		return order{Do: []string{"run", "view"}[m.rnd.IntN(2)], Key: fmt.Sprint("c-", m.rnd.Uint32()), Parent: boot}
	case n == 9:
		return order{Do: "cleanup"}
	}
	if leaves := m.leaves(); len(leaves) > 0 {
		return order{Do: "remove", Key: leaves[m.rnd.IntN(len(leaves))]}
	}
	return order{Do: "cleanup"}
}

// leaves returns the snapshots without children.
func (m *model) leaves() (leaves []string) {
	parents := slices.Collect(maps.Values(m.names))
	for _, name := range slices.Sorted(maps.Keys(m.names)) {
		if !slices.Contains(parents, name) {
			leaves = append(leaves, name)
		}
	}
	return leaves
}

// done notes what an order did.
func (m *model) done(t *testing.T, o order, a answer) {
	t.Helper()
	// An image in use by another snapshot's ending is no error of Cleanup's.
	if a.Err != "" && o.Do != "cleanup" {
		t.Fatalf("%+v: %s", o, a.Err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch o.Do {
	case "pull":
		m.names[o.Parent], m.names[o.Key] = "", o.Parent
	case "run", "view":
		m.names[o.Key] = o.Parent
		m.used[o.Parent] = true
	case "remove":
		delete(m.names, o.Key)
		delete(m.used, o.Key)
	}
}

// crashed starts the snapshotter again and takes what it has, which must be what was there before,
// with the order carried out, in part, or not.
func (m *model) crashed(t *testing.T, o order) {
	t.Helper()
	m.mu.Lock()
	m.kill = 0
	m.crashes++
	m.mu.Unlock()
	m.child.end()
	m.start(t)
	a, err := m.child.do(order{Do: "list"})
	if err != nil || a.Err != "" {
		t.Fatalf("list: %v, %s", err, a.Err)
	}
	for name := range m.names {
		if _, ok := a.Names[name]; !ok && (o.Do != "remove" || name != o.Key) {
			t.Fatalf("%s is lost after a crash in %+v", name, o)
		}
	}
	for name := range a.Names {
		if _, ok := m.names[name]; !ok && name != o.Key && name != o.Parent && name != "extract "+o.Key {
			t.Fatalf("%s came from nowhere after a crash in %+v", name, o)
		}
	}
	m.mu.Lock()
	m.names = a.Names
	for boot := range m.used {
		if _, ok := m.names[boot]; !ok {
			delete(m.used, boot)
		}
	}
	m.mu.Unlock()
	// containerd prepares the same again after the removal of what it knows nothing of.
	if name := "extract " + o.Key; m.has(name) {
		m.must(t, order{Do: "remove", Key: name})
	}
	if o.Do == "run" || o.Do == "view" { // nobody knows whether the image was used: it is now
		if m.has(o.Key) {
			m.must(t, order{Do: "remove", Key: o.Key})
		}
		m.must(t, o)
	}
}

func (m *model) has(name string) bool {
	_, ok := m.names[name]
	return ok
}

// must has an order carried out.
func (m *model) must(t *testing.T, o order) {
	t.Helper()
	a, err := m.child.do(o)
	if err != nil {
		t.Fatalf("%+v: %v", o, err)
	}
	m.done(t, o, a)
}

// check compares what is used and read with what should be, if the process lives so long.
func (m *model) check(t *testing.T) (lives bool) {
	t.Helper()
	m.mu.Lock()
	wrong := m.wrong
	m.mu.Unlock()
	if len(wrong) > 0 {
		t.Fatal(strings.Join(wrong, "\n"))
	}
	var got, want int64
	blobs, images := map[string]int64{}, map[string]bool{}
	for name, parent := range m.names {
		switch {
		case strings.HasPrefix(name, "boot-"):
			a, err := m.child.do(order{Do: "usage", Key: name})
			if err != nil {
				return false
			}
			if a.Err != "" {
				t.Fatalf("usage of %s: %s", name, a.Err)
			}
			if m.base == 0 && !m.used[name] {
				m.base = a.Size
			}
			got += a.Size - m.base
			if m.used[name] {
				image := m.imageOf(name)
				images[image.id] = true
				for _, b := range image.usage.Blobs {
					blobs[b.ID] = b.Disk
				}
			}
		case strings.HasPrefix(name, "c-"):
			a, err := m.child.do(order{Do: "mounts", Key: name})
			if err != nil {
				return false
			}
			if a.Err != "" {
				t.Fatalf("mounts of %s: %s", name, a.Err)
			}
			if p, err := os.ReadFile(filepath.Join(a.Lower[strings.LastIndex(a.Lower, ":")+1:], "hello")); string(p) != m.imageOf(parent).text {
				t.Fatalf("%s reads %q, %v; want %q", name, p, err, m.imageOf(parent).text)
			}
		}
	}
	for _, size := range blobs {
		want += size
	}
	if want += 10 * int64(len(images)); got != want {
		t.Fatalf("images count %d, want %d", got, want)
	}
	return true
}

// removeAll removes everything; nothing is left.
func (m *model) removeAll(t *testing.T) {
	t.Helper()
	m.crashed(t, order{}) // for the last time
	for leaves := m.leaves(); len(leaves) > 0; leaves = m.leaves() {
		for _, name := range leaves {
			m.mu.Lock()
			m.doubt = name
			m.mu.Unlock()
			m.must(t, order{Do: "remove", Key: name})
		}
	}
	var left string
	await(t, "everything goes", func() bool {
		a, err := m.child.do(order{Do: "cleanup"})
		mounts, merr := mountinfo.GetMounts(mountinfo.PrefixFilter(m.root))
		left = fmt.Sprint(names(t, m.root, snapshotsDir), names(t, m.root, trashDir), names(t, m.root, newDir), len(mounts), a.Err)
		return errors.Join(err, merr) == nil && left == "[] [] [] 0" && m.daemon.empty()
	})
}
