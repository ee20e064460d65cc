package nydustest

import (
	"context"
	"embed"
	"encoding/base64"
	"net"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/datadriven"
)

//go:embed testdata/*.txt
var testdata embed.FS

// patience is how long an answer and the end of a daemon may take.
const patience = 20 * time.Second

// Setup is the daemon that a sequence wants: fresh, with nothing registered.
type Setup struct {
	Name       string // of the sequence
	State      string // INIT, READY or RUNNING
	Supervisor bool   // has one, which has a state to give, unless Empty
	Empty      bool   // the supervisor has nothing, and the daemon no device
	Mounts     bool   // can mount by itself; otherwise it only serves what others mount
	NoFscache  bool   // serves no cache of the kernel's
	Broken     bool   // somebody has removed the directory of the kernel's cache
}

// A Target is a daemon at a unix socket.
type Target struct {
	Socket string
	Model  bool // it is the handler over a model, not a daemon
	// Vars are what sequences name. Those that use blobs need BOOT1 and BOOT2, paths of
	// the bootstraps of different images, BLOB1 and BLOB2, the id of a data blob of
	// each, and BLOBDIR, the directory of their blobs. Run adds DIR, an empty
	// directory, FILE, a file that is no bootstrap, and SECRET, AUTH and AUTH2, a
	// password and credentials with it.
	Vars map[string]string
}

// Run runs every sequence, each against what start makes of its setup; start may skip.
func Run(t *testing.T, start func(t *testing.T, s Setup) Target) {
	files, err := testdata.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(f.Name(), ".txt"), func(t *testing.T) {
			data, err := testdata.ReadFile(path.Join("testdata", f.Name()))
			if err != nil {
				t.Fatal(err)
			}
			s := &sequence{name: strings.TrimSuffix(f.Name(), ".txt"), start: start}
			datadriven.RunTestFromString(t, string(data), s.step)
			s.end(t)
		})
	}
}

// A sequence is a file that runs.
type sequence struct {
	name   string
	start  func(t *testing.T, s Setup) Target
	target Target
	vars   map[string]string
	client *http.Client
	silent net.Conn // never sends a byte
	gone   bool
}

func (s *sequence) step(t *testing.T, d *datadriven.TestData) string {
	if only := argument(d, "only"); only != "" && (only == "model") != s.target.Model {
		return d.Expected
	}
	var got string
	switch d.Cmd {
	case "start":
		s.begin(t, d)
		return ""
	case "http":
		got = s.http(t, d)
	case "raw":
		got = s.raw(t, d)
	case "gone":
		s.waitGone(t)
		return ""
	default:
		d.Fatalf(t, "unknown command %s", d.Cmd)
	}
	if s.matches(d.Expected, got) {
		return d.Expected
	}
	return got
}

func (s *sequence) begin(t *testing.T, d *datadriven.TestData) {
	s.target = s.start(t, Setup{
		Name: s.name, State: argument(d, "state"),
		Supervisor: d.HasArg("supervisor"), Empty: d.HasArg("empty"), Mounts: d.HasArg("mounts"),
		NoFscache: d.HasArg("nofscache"), Broken: d.HasArg("broken"),
	})
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("no bootstrap"), 0o600); err != nil {
		t.Fatal(err)
	}
	secret := "sesame-open-7731"
	s.vars = map[string]string{
		"DIR": dir, "FILE": file, "SECRET": secret,
		"AUTH":  base64.StdEncoding.EncodeToString([]byte("user:" + secret)),
		"AUTH2": base64.StdEncoding.EncodeToString([]byte("other:" + secret)),
	}
	for name, value := range s.target.Vars {
		s.vars[name] = value
	}
	transport := &http.Transport{
		MaxIdleConnsPerHost: 64,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", s.target.Socket)
		},
	}
	t.Cleanup(transport.CloseIdleConnections)
	s.client = &http.Client{Transport: transport, Timeout: patience}
	s.silent = s.dial(t)
}

// argument is the value of an argument, empty if there is none.
func argument(d *datadriven.TestData, name string) (value string) {
	for _, a := range d.CmdArgs {
		if a.Key == name {
			value = strings.Join(a.Vals, "")
		}
	}
	return value
}

// expand puts the variables into text.
func (s *sequence) expand(text string) string {
	for name, value := range s.vars {
		text = strings.ReplaceAll(text, "${"+name+"}", value)
	}
	return text
}

// matches reports whether got is what is expected, where * is any text.
func (s *sequence) matches(expected, got string) bool {
	pieces := strings.Split(s.expand(expected), "*")
	for i, p := range pieces {
		pieces[i] = regexp.QuoteMeta(p)
	}
	return regexp.MustCompile(`(?s)\A` + strings.Join(pieces, ".*") + `\z`).MatchString(got)
}

func (s *sequence) dial(t *testing.T) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", s.target.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// end checks what holds for every sequence.
func (s *sequence) end(t *testing.T) {
	if s.silent == nil || s.gone || t.Failed() {
		return
	}
	if err := s.silent.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	n, err := s.silent.Read(make([]byte, 1))
	if e, timeout := err.(net.Error); n != 0 || !timeout || !e.Timeout() {
		t.Errorf("a connection that sent nothing: %d bytes, %v; clients take its end for the daemon's death", n, err)
	}
}

// waitGone waits until nobody listens, and the silent connection has ended.
func (s *sequence) waitGone(t *testing.T) {
	s.gone = true
	deadline := time.Now().Add(patience)
	if err := s.silent.SetReadDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	if n, err := s.silent.Read(make([]byte, 1)); n != 0 || os.IsTimeout(err) {
		t.Errorf("a silent connection as the daemon ended: %d bytes, %v", n, err)
	}
	for {
		c, err := net.Dial("unix", s.target.Socket)
		if err != nil {
			return
		}
		c.Close()
		if time.Now().After(deadline) {
			t.Fatalf("somebody still listens after %v", patience)
		}
		time.Sleep(time.Millisecond)
	}
}
