package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/fanotify"
	"github.com/erofsd/erofsd/internal/testenv"
)

// TestNydusd has images served by a nydusd with fscache: by erofsd, of which nothing but
// nydusd's API is seen, and by nydusd itself.
func TestNydusd(t *testing.T) {
	for _, name := range []string{"erofsd", "nydusd"} {
		t.Run(name, func(t *testing.T) {
			testenv.Kernel(t, "cachefiles", cachefiles.Supported("", t.TempDir()))
			w := newNydusdWorld(t)
			w.command = w.asErofsd(filepath.Join(w.dir, "fscache"))
			if name == "nydusd" {
				w.command = w.asNydusd(testenv.Tool(t, "nydusd"))
			}
			w.life(t)
		})
	}
}

// TestNydusdFuse has images served by a nydusd with FUSE.
func TestNydusdFuse(t *testing.T) {
	w := newNydusdWorld(t)
	w.command = w.asFuse(testenv.Tool(t, "nydusd"))
	_, err := os.Stat("/dev/fuse")
	testenv.Kernel(t, "fuse", err)
	w.life(t)
}

// TestNydusdLogin has a nydusd read with docker's login, which is written nowhere. What it
// has fetched counts as the image's.
func TestNydusdLogin(t *testing.T) {
	w := newNydusdWorld(t)
	program := testenv.Tool(t, "nydusd")
	w.command = w.asFuse(program)
	named := true // are nydusd's files; the kernel's are when they were closed first
	if cachefiles.Supported("", t.TempDir()) == nil {
		w.command, named = w.asNydusd(program), false
	}
	w.registry.set("hunter2")
	auth := base64.StdEncoding.EncodeToString([]byte("anna:hunter2"))
	docker := t.TempDir()
	if err := os.WriteFile(filepath.Join(docker, "config.json"), fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, w.host, auth), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", docker)
	w.configure = func(c *config) { c.Backend.Credentials = "docker" }
	w.run(t)
	w.start(t)
	top := w.pull(t, goodImage)
	w.reads(t, w.container(t, "container", top))
	const most = 4 << 20 // of what was read, compressed or not
	if usage, err := w.sn.Usage(t.Context(), top); err != nil || named && usage.Size < most {
		t.Errorf("the image takes %d bytes, %v", usage.Size, err)
	}
	if w.registry.tokens() == 0 {
		t.Error("nobody asked for a token")
	}
	files := 0
	err := filepath.WalkDir(w.dir, func(name string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && slices.Contains([]string{"mnt", "run", "fuse"}, e.Name()):
			return fs.SkipDir
		case !e.Type().IsRegular():
			return nil
		}
		files++
		text, err := os.ReadFile(name)
		if bytes.Contains(text, []byte("hunter2")) || bytes.Contains(text, []byte(auth)) {
			t.Errorf("%s has the login", name)
		}
		return err
	})
	if err != nil || files < 5 {
		t.Errorf("%d files, %v", files, err)
	}
	if log := w.log.String(); strings.Contains(log, "hunter2") || strings.Contains(log, auth) {
		t.Error("the log has the login")
	}
	w.remove(t, "container")
}

// life is two images' from the pull to the removal.
func (w *nydusdWorld) life(t *testing.T) {
	w.start(t)
	good := w.pull(t, goodImage) // without a daemon
	w.run(t)
	first := w.container(t, "first", good)
	w.reads(t, first)
	w.reads(t, w.container(t, "second", good))
	bad := w.pull(t, badImage)
	w.reads(t, w.container(t, "third", bad))
	w.running(t, 2)

	// Another snapshotter leaves everything as it is.
	before := w.mounts(t)
	w.end()
	w.start(t)
	w.reads(t, w.container(t, "fourth", bad))
	w.remove(t, "second", "fourth")
	w.running(t, 2)
	if after := w.mounts(t); len(before) != 2 || !equal(before, after) {
		t.Errorf("mounts %v, and with another snapshotter %v", before, after)
	}

	w.death(t, good)
	w.remove(t, "first", "third")
	for _, top := range []string{good, bad} {
		if err := w.sn.Remove(t.Context(), top); err != nil {
			t.Error(err)
		}
	}
	w.swept(t)
	if left := w.left(t, "root/nydusd/*", "root/snapshots/*", "root/trash/*", "fscache/cache/*/*/D*"); len(left) > 0 || len(w.mounts(t)) > 0 {
		t.Errorf("there is left %q, and mounted %v; the log:\n%s", left, w.mounts(t), w.log.String())
	}
}

// death kills nydusd and starts it again, while containers use its images.
func (w *nydusdWorld) death(t *testing.T, top string) {
	t.Helper()
	w.kill(t)
	w.await(t, "the death is seen", func() bool { return strings.Contains(w.log.String(), "nydusd's process has ended") })
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	if _, err := w.sn.Prepare(ctx, "early", top); err == nil {
		t.Error("a container of an image that nobody serves could be made")
	}
	if _, err := w.sn.Prepare(t.Context(), "ordinary", ""); err != nil {
		t.Errorf("an ordinary container: %v", err)
	}
	w.run(t)
	w.reads(t, w.container(t, "later", top))
	w.running(t, 2)
	w.remove(t, "later", "ordinary")
}

// running waits until the system API tells of nydusd, and of so many images.
func (w *nydusdWorld) running(t *testing.T, images int) {
	t.Helper()
	w.await(t, "nydusd serves the images", func() bool {
		list := w.status(t)
		return len(list) == 1 && list[0].PID == w.cmd.Process.Pid && list[0].Reference == images
	})
}

func (w *nydusdWorld) await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(patienceOfTest); !is(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s; the log:\n%s", what, w.log.String())
		}
	}
}

// swept cleans up until nothing has to be tried again.
func (w *nydusdWorld) swept(t *testing.T) {
	t.Helper()
	var err error
	for end := time.Now().Add(patienceOfTest); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err = w.sn.(snapshots.Cleaner).Cleanup(t.Context()); err == nil {
			return
		}
	}
	t.Errorf("clean up: %v; the log:\n%s", err, w.log.String())
}

// mounts are the images' mounts: places, by the kernel's number.
func (w *nydusdWorld) mounts(t *testing.T) map[int]string {
	t.Helper()
	list, err := mountinfo.GetMounts(mountinfo.PrefixFilter(filepath.Join(w.dir, "root")))
	if err != nil {
		t.Fatal(err)
	}
	found := map[int]string{}
	for _, m := range list {
		found[m.ID] = m.Mountpoint
	}
	return found
}

func equal(a, b map[int]string) bool {
	if len(a) != len(b) {
		return false
	}
	for id, place := range a {
		if b[id] != place {
			return false
		}
	}
	return true
}

// TestNydusdElsewhere has a nydusd on a kernel without fscache: who wants an image is told
// what is missing, and nothing stays of it.
func TestNydusdElsewhere(t *testing.T) {
	testenv.Kernel(t, "fanotify", fanotify.Supported(t.TempDir()))
	if cachefiles.Supported("", t.TempDir()) == nil {
		testenv.Need(t, "no cachefiles", "needs a kernel without cachefiles on demand")
	}
	w := newNydusdWorld(t)
	w.command = w.asErofsd("")
	w.run(t)
	w.start(t)
	top := w.pull(t, goodImage)
	if _, err := w.sn.Prepare(t.Context(), "container", top); err == nil || !strings.Contains(err.Error(), "CONFIG_EROFS_FS_ONDEMAND") {
		t.Errorf("a container: %v", err)
	}
	if err := w.sn.Remove(t.Context(), top); err != nil {
		t.Error(err)
	}
	w.swept(t)
	if left := w.left(t, "root/nydusd/*", "root/snapshots/*", "root/trash/*"); len(left) > 0 {
		t.Errorf("there is left %q", left)
	}
}

// TestNydusdMode wants a nydusd to be meant: one at the socket of an erofsd that is to be
// started is a mistake.
func TestNydusdMode(t *testing.T) {
	testenv.Kernel(t, "fanotify", fanotify.Supported(t.TempDir()))
	w := newNydusdWorld(t)
	w.command = w.asErofsd("")
	w.run(t)
	w.await(t, "it listens", func() bool { _, err := os.Stat(w.socket()); return !errors.Is(err, os.ErrNotExist) })
	d := newDaemon(daemonConfig{Mode: modeStart, Socket: w.socket()}, nil, nil)
	defer d.close()
	if _, err := d.identify(t.Context()); err == nil || !strings.Contains(err.Error(), `daemon.mode = "connect"`) {
		t.Errorf("error %v", err)
	}
}
