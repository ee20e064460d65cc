package snapshotter

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/erofsd/erofsd/internal/testenv"
)

const secretText = "hunter2-not-for-anybody"

// A changingSource has a login that changes.
type changingSource struct {
	changed chan struct{}

	mu      sync.Mutex
	origin  Origin
	err     error
	asked   int
	refused int
	after   *Origin // what it is once it was refused
}

func (c *changingSource) source(context.Context, string) (Origin, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	return c.origin, c.err
}

func (c *changingSource) refuse(string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refused++
	if c.after != nil {
		c.origin = *c.after
	}
}

func (c *changingSource) set(o Origin) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.origin = o
}

func (c *changingSource) counts() (asked, refused int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.asked, c.refused
}

// change says that there may be another login and waits until somebody asks.
func (c *changingSource) change(t *testing.T) {
	t.Helper()
	before, _ := c.counts()
	c.changed <- struct{}{}
	until(t, "nobody asks", func() bool { asked, _ := c.counts(); return asked > before })
}

// originOf has a login if there is one.
func originOf(login string) Origin {
	text, err := json.Marshal(login)
	if err != nil {
		panic(err)
	}
	return Origin{Config: text, Login: login != ""}
}

// newRenewal returns a snapshotter with a container of an image, whose source changes.
func newRenewal(t *testing.T, first Origin) (*lazyRig, *changingSource, *testenv.Buffer) {
	t.Helper()
	c := &changingSource{changed: make(chan struct{}, 1), origin: first}
	log := &testenv.Buffer{}
	r := newLazy(t, func(s *Snapshotter) { s.source = c.source }, WithLogger(slog.New(slog.NewTextHandler(log, nil))),
		WithRenewal(Renewal{Look: time.Millisecond, Changed: c.changed, Refused: c.refuse}))
	prepare(t, r.Snapshotter, "c", pull(t.Context(), t, r, "1", bootstrapOf(t, "with a login"), labelReference, "registry.example/app:1"))
	return r, c, log
}

// config is what the daemon was told last of its only image.
func (d *fakeDaemon) config() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, b := range d.bound {
		return string(b.Config)
	}
	return ""
}

// deny has a registry refuse the login of the only image.
func (d *fakeDaemon) deny(denied bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for key := range d.bound {
		d.denied[key] = denied
	}
}

// until waits for a condition.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for !done() {
		if t.Context().Err() != nil {
			t.Fatal(what)
		}
		time.Sleep(time.Millisecond)
	}
}

// TestRenewChanged: what the source says anew reaches the daemon, and only that.
func TestRenewChanged(t *testing.T) {
	r, c, _ := newRenewal(t, originOf("one"))
	if got := r.daemon.config(); got != `"one"` {
		t.Fatalf("bound with %s", got)
	}
	c.change(t)
	c.set(originOf("two"))
	c.changed <- struct{}{}
	until(t, "the new login does not reach the daemon", func() bool { return r.daemon.config() == `"two"` })
	if n := r.daemon.count("bind"); n != 2 {
		t.Errorf("bound %d times, want 2: the same was said again", n)
	}
	c.set(originOf("")) // it is gone: containers read on with what there is
	c.change(t)
	c.set(originOf("three"))
	c.changed <- struct{}{}
	until(t, "the new login does not reach the daemon", func() bool { return r.daemon.config() == `"three"` })
	if n := r.daemon.count("bind"); n != 3 {
		t.Errorf("bound %d times, want 3", n)
	}
	if _, refused := c.counts(); refused > 0 {
		t.Errorf("%d refusals, and there was none", refused)
	}
}

// TestRenewRefused: a registry that refuses makes the source look again, and the new login
// goes to the daemon; but not in every moment as long as there is none.
func TestRenewRefused(t *testing.T) {
	r, c, log := newRenewal(t, originOf("old"))
	after := originOf("new")
	c.mu.Lock()
	c.after = &after
	c.mu.Unlock()
	r.daemon.deny(true)
	until(t, "the new login does not reach the daemon", func() bool { return r.daemon.config() == `"new"` })
	r.daemon.deny(false)
	asked, _ := c.counts()
	c.mu.Lock()
	c.after = &Origin{}
	c.mu.Unlock()
	r.daemon.deny(true)
	until(t, "nobody says that there is no login", func() bool { return bytes.Contains([]byte(log.String()), []byte("there is no login")) })
	before := r.daemon.count("status")
	until(t, "nobody looks", func() bool { return r.daemon.count("status") > before+200 })
	if now, _ := c.counts(); now > asked+50 { // the pause doubles: a dozen
		t.Errorf("the source was asked %d times while 200 looks found the same", now-asked)
	}
	if r.daemon.config() != `"new"` {
		t.Errorf("the daemon was told %s", r.daemon.config())
	}
}

// TestRenewBefore: a login is asked for again before it expires.
func TestRenewBefore(t *testing.T) {
	first := originOf("short")
	first.Until = time.Now().Add(-time.Minute)
	r, c, _ := newRenewal(t, first)
	until(t, "nobody asks", func() bool { asked, _ := c.counts(); return asked > 2 })
	c.set(originOf("long"))
	until(t, "the new login does not reach the daemon", func() bool { return r.daemon.config() == `"long"` })
	asked, _ := c.counts()
	before := r.daemon.count("status")
	until(t, "nobody looks", func() bool { return r.daemon.count("status") > before+20 })
	if now, _ := c.counts(); now != asked {
		t.Errorf("the source was asked %d times though nothing expires", now-asked)
	}
}

// TestUnsure: after a restart in which logins were forgotten, the daemon keeps what it has,
// until there is one again; a daemon that knows nothing is told what there is.
func TestUnsure(t *testing.T) {
	r, c, _ := newRenewal(t, originOf("one"))
	forgotten := originOf("")
	forgotten.Unsure = true
	c.set(forgotten)
	r.restart(t)
	before, _ := c.counts()
	prepare(t, r.Snapshotter, "d", "sha256:boot-1")
	if now, _ := c.counts(); now == before || r.daemon.config() != `"one"` || r.daemon.count("bind") != 1 {
		t.Errorf("the daemon was told %s; the source was asked: %v", r.daemon.config(), now > before)
	}
	c.set(originOf("two"))
	c.changed <- struct{}{}
	until(t, "the new login does not reach the daemon", func() bool { return r.daemon.config() == `"two"` })

	c.set(forgotten)
	if err := r.daemon.restart(); err != nil {
		t.Fatal(err)
	}
	r.Recover()
	until(t, "the image is not mounted again", func() bool { return r.daemon.config() == `""` && isImage(r.point(r.lazyID(t))) })
}

// restart forgets everything, as a daemon that died with its keeper.
func (d *fakeDaemon) restart() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	clear(d.bound)
	clear(d.mounts)
	return nil
}

// lazyID is the number of the snapshot of the only image.
func (r *lazyRig) lazyID(t *testing.T) string {
	t.Helper()
	for _, id := range names(t, r.root, snapshotsDir) {
		if _, err := readRecord(r.path(snapshotsDir, id)); err == nil {
			return id
		}
	}
	t.Fatal("no image")
	return ""
}

// TestLoginsNowhere: neither logins of the source nor such in labels are in any file, log
// record, mount option or label.
func TestLoginsNowhere(t *testing.T) {
	r, c, log := newRenewal(t, originOf(secretText))
	login := []string{labelPullUser, "anna", labelPullSecret, secretText, labelReference, "registry.example/app:2"}
	top := pull(t.Context(), t, r, "2", bootstrapOf(t, "labelled"), login...)
	r.nowhere(t, "after the pull")
	labels := map[string]string{labelPullUser: "anna", labelPullSecret: secretText, "containerd.io/snapshot/kept": "x"}
	mounts, err := r.Prepare(t.Context(), "e", top, snapshots.WithLabels(labels))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.View(t.Context(), "v", top, snapshots.WithLabels(labels)); err != nil {
		t.Fatal(err)
	}
	r.nowhere(t, "after the containers were made")
	info, err := r.Stat(t.Context(), "e")
	if err != nil || info.Labels["containerd.io/snapshot/kept"] != "x" {
		t.Errorf("labels %v, %v", info.Labels, err)
	}
	for _, path := range [][]string{nil, {"labels"}, {"labels." + labelPullSecret}} {
		info.Labels = labels
		if _, err := r.Update(t.Context(), info, path...); err != nil {
			t.Errorf("%q: %v", path, err)
		}
		r.nowhere(t, "after an update")
	}
	if labels[labelPullSecret] != secretText {
		t.Error("the caller's labels were changed")
	}
	c.set(originOf(secretText + "2"))
	c.changed <- struct{}{}
	until(t, "the new login does not reach the daemon", func() bool { return r.daemon.count("bind") >= 4 })
	r.daemon.deny(true)
	until(t, "nobody asks", func() bool { _, refused := c.counts(); return refused > 0 })
	m, err := json.Marshal(mounts)
	if err != nil || bytes.Contains(m, []byte("hunter2")) {
		t.Errorf("mounts %s, %v", m, err)
	}
	if !bytes.Contains([]byte(log.String()), []byte("logins in labels are ignored")) || bytes.Contains([]byte(log.String()), []byte("hunter2")) {
		t.Errorf("log: %s", log)
	}
	r.nowhere(t, "in the end")
}

// nowhere looks for logins in all files. It is asked after each step: what the store has
// freed is overwritten later.
func (r *lazyRig) nowhere(t *testing.T, when string) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(r.root, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		files++
		text, err := os.ReadFile(name)
		if bytes.Contains(text, []byte("hunter2")) || bytes.Contains([]byte(name), []byte("hunter2")) {
			err = errors.Join(err, errors.New(name+" has a login"))
		}
		return err
	})
	if err != nil || files < 5 {
		t.Errorf("%s: %d files, %v", when, files, err)
	}
}
