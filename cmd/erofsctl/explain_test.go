package main

import (
	"bytes"
	"strings"
	"testing"
)

// TestExplain prints what the snapshotter says, and asks it for what was asked.
func TestExplain(t *testing.T) {
	r, socket := record(t)
	r.answer = `[{"reference":"registry.example/app:1","name":"n","lazy":true,"state":"mounted","why":"so","mountpoint":"/s/7/mnt",` +
		`"layers":[{"snapshot":"7","decision":"bootstrap","why":"it has metadata","labels":{"b":"true","a":"1"}},{"snapshot":"6","decision":"remote","why":"it has data"}]},` +
		`{"name":"ns/1/sha256:x","state":"unpacked","why":"no annotation","layers":[]}]`
	want := `registry.example/app:1
  served lazily (mounted): so
  mount point /s/7/mnt
  snapshot 7 bootstrap: it has metadata
    a = "1"
    b = "true"
  snapshot 6 remote: it has data

ns/1/sha256:x
  not served lazily: no annotation
`
	var out bytes.Buffer
	run := func(args ...string) error {
		out.Reset()
		c := command()
		c.Writer = &out
		return c.Run(t.Context(), append([]string{"erofsctl", "--snapshotter", socket}, args...))
	}
	if err := run("explain", "registry.example/app:1"); err != nil || out.String() != want || r.path != "/explain" {
		t.Errorf("%v; asked %s; printed\n%s\nwant\n%s", err, r.path, out.String(), want)
	}
	if err := run("explain", "--json"); err != nil || !strings.Contains(out.String(), `"decision": "bootstrap"`) {
		t.Errorf("%v; printed %s", err, out.String())
	}
	r.answer = "[]"
	if err := run("explain", "none"); err == nil || !strings.Contains(err.Error(), "no image none") {
		t.Errorf("of no image: %v", err)
	}
	if err := run("explain", "a", "b"); err == nil {
		t.Error("two images")
	}
	if err := run("--snapshotter", socket+"x", "explain"); err == nil || !strings.Contains(err.Error(), "system.address") {
		t.Errorf("without a snapshotter: %v", err)
	}
}

// TestStatusNamesImages shows containerd's images by their references.
func TestStatusNamesImages(t *testing.T) {
	daemon, daemonSocket := record(t)
	daemon.answer = `{"images":[{"mountpoint":"/s/7/mnt","source":"/s/7/fs/image/image.boot"},{"mountpoint":"/other","source":"by-hand"}]}`
	snapshotter, socket := record(t)
	snapshotter.answer = `[{"reference":"registry.example/app:1","mountpoint":"/s/7/mnt"}]`
	for name, c := range map[string]struct {
		socket string
		want   string
	}{"with": {socket, "registry.example/app:1"}, "without": {socket + "x", "/s/7/fs/image/image.boot"}} {
		var out bytes.Buffer
		cmd := command()
		cmd.Writer = &out
		if err := cmd.Run(t.Context(), []string{"erofsctl", "--daemon", daemonSocket, "--snapshotter", c.socket, "status"}); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out.String(), c.want+"\n") || !strings.Contains(out.String(), "by-hand\n") {
			t.Errorf("%s a snapshotter it prints\n%s", name, out.String())
		}
	}
}
