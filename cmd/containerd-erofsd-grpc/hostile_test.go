package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// TestBrokenBootstrap has images with metadata that are none, or lie: containerd is told which
// image cannot be had and that it is the image's fault, and nothing of it stays.
func TestBrokenBootstrap(t *testing.T) {
	const super = 1024 // where the superblock begins
	t.Parallel()       // it waits
	w := newBadWorld(t)
	worker, _ := w.rig.daemon(t)
	for _, c := range []struct {
		name  string
		spoil func(boot []byte) []byte
	}{
		{"empty", func([]byte) []byte { return nil }},
		{"a text", func([]byte) []byte { return []byte("this is no bootstrap\n") }},
		{"one block of zeros", func([]byte) []byte { return make([]byte, 4096) }},
		{"huge and sparse", func([]byte) []byte { return make([]byte, 16<<20) }},
		{"no magic", func(b []byte) []byte { b[super] ^= 0xff; return b }},
		{"cut after the superblock", func(b []byte) []byte { return b[:4096] }},
		{"cut in the middle", func(b []byte) []byte { return b[:len(b)/2&^4095] }},
		{"no whole block at the end", func(b []byte) []byte { return b[:len(b)-100] }},
		{"blocks of another size", func(b []byte) []byte { b[super+12] = 31; return b }},
		{"root out of the file", func(b []byte) []byte { binary.LittleEndian.PutUint16(b[super+14:], 0xffff); return b }},
		{"unknown features", func(b []byte) []byte { binary.LittleEndian.PutUint32(b[super+80:], 0x80000000); return b }},
		{"more devices than there are", func(b []byte) []byte { binary.LittleEndian.PutUint16(b[super+86:], 0xffff); return b }},
		{"inodes of garbage", func(b []byte) []byte { copy(b[len(b)/4:], bytes.Repeat([]byte{0xa5}, len(b)/2)); return b }},
	} {
		t.Run(c.name, func(t *testing.T) {
			top, err := w.pull(t.Context(), "broken", w.host+"/team/bad:1", c.spoil(fixture(t, badImage)))
			if err != nil {
				t.Fatal(err)
			}
			_, err = w.sn.Prepare(t.Context(), "container", top)
			if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/team/bad:1") {
				t.Errorf("containerd is told: %v; want the image, and that it is its fault", err)
			}
			t.Log(err)
			w.gone(t, "container")
			w.others(t)
			w.forget(t, top)
			w.clean(t)
		})
	}
	if now, _ := w.rig.daemon(t); now != worker {
		t.Errorf("the daemon's worker was %d and is %d", worker, now)
	}
}

// TestHostileLabels has labels and names that nobody should trust: each is refused, or of no
// effect; nothing leaves the snapshotter's directory.
func TestHostileLabels(t *testing.T) {
	t.Parallel() // it waits
	w := newBadWorld(t)
	const prefix = "containerd.io/snapshot/"
	long := strings.Repeat("x", 1<<20)
	for _, c := range []struct {
		name   string
		key    string
		labels map[string]string
		is     func(error) bool // nil: no error
	}{
		{"reference without a host", "a", map[string]string{prefix + "nydus-bootstrap": "true", prefix + "cri.image-ref": "../../../etc/passwd"}, errdefs.IsFailedPrecondition},
		{"reference with a query", "a", map[string]string{prefix + "nydus-bootstrap": "true", prefix + "cri.image-ref": "host/app?x=y"}, errdefs.IsFailedPrecondition},
		{"reference with a line break", "a", map[string]string{prefix + "nydus-bootstrap": "true", prefix + "cri.image-ref": "host/app\nlog line"}, errdefs.IsFailedPrecondition},
		{"reference that is no text", "a", map[string]string{prefix + "nydus-bootstrap": "true", prefix + "cri.image-ref": "host/" + "\u0000"}, errdefs.IsFailedPrecondition},
		{"huge reference", "a", map[string]string{prefix + "nydus-bootstrap": "true", prefix + "cri.image-ref": "host/" + long}, errdefs.IsInvalidArgument},
		{"huge version", "a", map[string]string{prefix + "nydus-bootstrap": "true", prefix + "cri.image-ref": "host/app", prefix + "nydus-fs-version": long}, errdefs.IsFailedPrecondition},
		{"mount options in a mapping", "a", map[string]string{prefix + "uidmapping": "0:0:1,lowerdir=/"}, errdefs.IsInvalidArgument},
		{"huge mapping", "a", map[string]string{prefix + "uidmapping": strings.Repeat("0:1:1,", 1<<17) + "x"}, errdefs.IsInvalidArgument},
		{"data layer of a pod", "a", map[string]string{prefix + "nydus-blob": "true", prefix + "nydus-bootstrap": "true"}, nil},
		{"huge label of a pod", "a", map[string]string{prefix + "whatever": long}, nil},
		{"name with a path", "../../../../etc/cron.d/x", nil, nil},
		{"name with line breaks and zeros", "a\n\x00b", nil, nil},
		{"long name", strings.Repeat("n", 30_000), nil, nil},
		{"longer name than the database has", strings.Repeat("n", 1<<20), nil, errdefs.IsInvalidArgument},
		{"no name", "", nil, errdefs.IsInvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.labels[prefix+"nydus-bootstrap"] != "" && c.is != nil {
				c.labels[snapshots.LabelSnapshotRef] = "sha256:hostile"
			}
			m, err := w.sn.Prepare(t.Context(), c.key, "", snapshots.WithLabels(c.labels))
			switch {
			case c.is != nil && err == nil:
				t.Error("it is accepted")
				fallthrough
			case err == nil:
				if dir := filepath.Join(w.dir, "root", "snapshots") + "/"; !strings.HasPrefix(m[0].Source, dir) || len(m[0].Options) != 2 {
					t.Errorf("mounts %+v", m)
				}
				if err := w.sn.Remove(t.Context(), c.key); err != nil {
					t.Error(err)
				}
			case c.is != nil && (!c.is(err) || len(err.Error()) > 2000):
				t.Errorf("error of %d bytes, %T: %.500v", len(err.Error()), err, err)
			case c.is == nil && err != nil:
				t.Errorf("error: %v", err)
			}
			w.others(t)
			w.clean(t)
		})
	}
}

// TestHungDaemon stops the daemon as SIGSTOP does: who wants an image of it leaves when he
// likes; images that are mounted and ordinary ones, and everything that is no image, go on.
func TestHungDaemon(t *testing.T) {
	t.Parallel() // it waits
	w := newBadWorld(t)
	w.others(t) // it is mounted
	top, err := w.pull(t.Context(), "bad", w.host+"/team/bad:1", fixture(t, badImage))
	if err != nil {
		t.Fatal(err)
	}
	worker, keeper := w.rig.daemon(t)
	signal := func(s syscall.Signal) {
		for _, pid := range []int{keeper, worker} { // the keeper would replace it
			if err := syscall.Kill(pid, s); err != nil && !errors.Is(err, syscall.ESRCH) {
				t.Error(err)
			}
		}
	}
	signal(syscall.SIGSTOP)
	defer signal(syscall.SIGCONT)
	ctx, cancel := context.WithTimeout(t.Context(), callTime)
	defer cancel()
	if _, err := w.sn.Prepare(ctx, "waits", top); !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("who left is told: %v", err)
	}
	w.gone(t, "waits")
	if _, err := w.sn.Prepare(t.Context(), "mounted", w.good); err != nil {
		t.Errorf("another container of the mounted image: %v", err)
	}
	w.ordinary(t, "meanwhile")
	for _, key := range []string{"mounted", top} {
		_, uerr := w.sn.Usage(t.Context(), key)
		if err := errors.Join(uerr, w.sn.Remove(t.Context(), key)); err != nil {
			t.Errorf("%s: %v", key, err)
		}
	}
	ctx, cancel = context.WithTimeout(t.Context(), callTime)
	defer cancel()
	if err := w.sn.(snapshots.Cleaner).Cleanup(ctx); err != nil && !errdefs.IsDeadlineExceeded(err) {
		t.Errorf("clean up: %v", err)
	}
	signal(syscall.SIGCONT)
	w.others(t)
	w.clean(t)
}

// TestNoDaemon has no socket of a daemon: ordinary images run, and who wants a lazy one is told
// what is missing.
func TestNoDaemon(t *testing.T) {
	t.Parallel() // it waits
	w := newBadWorld(t)
	w.stop(t, syscall.SIGTERM)
	text, err := os.ReadFile(w.config)
	if err != nil {
		t.Fatal(err)
	}
	missing := filepath.Join(w.dir, "run", "nobody.sock")
	config := strings.Replace(string(text), "[daemon]\nsocket = \""+filepath.Join(w.dir, "run", "erofsd.sock"), "[daemon]\nmode = \"connect\"\nsocket = \""+missing, 1)
	if err := os.WriteFile(w.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	w.start(t)
	w.ordinary(t, "alone")
	ended := make(chan error, 1)
	go func() {
		_, err := w.sn.Prepare(t.Context(), "container", w.good)
		ended <- err
	}()
	w.ordinary(t, "beside")
	if err := <-ended; !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), missing) || !strings.Contains(err.Error(), "/team/good:1") {
		t.Errorf("containerd is told: %v", err)
	} else {
		t.Log(err)
	}
	w.gone(t, "container")
	w.stop(t, syscall.SIGTERM)
	if err := os.WriteFile(w.config, text, 0o600); err != nil {
		t.Fatal(err)
	}
	w.start(t)
	w.others(t)
	w.clean(t)
}
