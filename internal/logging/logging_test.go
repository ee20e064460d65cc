package logging

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// patience is how long something may take that should take no time.
const patience = 20 * time.Second

// start returns a logger that is closed with the test.
func start(t *testing.T, o Options) *Logger {
	t.Helper()
	l, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close(t.Context()) })
	return l
}

// flush closes l and fails t when that does not go well.
func flush(t *testing.T, l *Logger) {
	t.Helper()
	if err := l.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func TestText(t *testing.T) {
	var out bytes.Buffer
	l := start(t, Options{Level: "TRACE", Out: &out})
	l.Info("serving", "root", "/var/lib", "text", "two words", "empty", "")
	l.Warn("first\nsecond \"quoted\" ünd\x01", "err", errors.New("a\nb"))
	l.Log(t.Context(), LevelTrace, "deep")
	l.With("image", "i").WithGroup("g").Debug("grouped", "level", slog.LevelInfo, "msg", "m", slog.Group("h", "n", 1))
	l.Error("end", "level", slog.LevelInfo, "msg", "")
	flush(t, l)
	stamp := regexp.MustCompile(`(?m)^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{6} \+00:00\] `)
	want := `INFO serving root=/var/lib text="two words" empty=""
WARN first\nsecond "quoted" ünd\x01 err="a\nb"
TRACE deep
DEBUG grouped image=i g.level=INFO g.msg=m g.h.n=1
ERROR end level=INFO msg=""
`
	if diff := cmp.Diff(want, stamp.ReplaceAllString(out.String(), "")); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
	if n := len(stamp.FindAllString(out.String(), -1)); n != 5 {
		t.Errorf("%d of 5 lines have a time:\n%s", n, &out)
	}
}

func TestJSON(t *testing.T) {
	var out bytes.Buffer
	l := start(t, Options{Level: "trace", Format: "JSON", Out: &out})
	l.Log(t.Context(), LevelTrace, "deep", "n", 1)
	flush(t, l)
	var got map[string]any
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if _, ok := got["time"]; !ok {
		t.Error("no time")
	}
	delete(got, "time")
	if diff := cmp.Diff(map[string]any{"level": "TRACE", "msg": "deep", "n": 1.0}, got); diff != "" {
		t.Errorf("record (-want +got):\n%s", diff)
	}
}

func TestLevels(t *testing.T) {
	levels := []slog.Level{slog.LevelError, slog.LevelWarn, slog.LevelInfo, slog.LevelDebug, LevelTrace}
	var out bytes.Buffer
	l := start(t, Options{Out: &out})
	if l.Level() != "info" {
		t.Errorf("the level is %s at first, want info", l.Level())
	}
	for visible, name := range []string{"off", "Error", "WARN", "info", "debug", "trace"} {
		if err := l.SetLevel(name); err != nil {
			t.Fatal(err)
		}
		if l.Level() != strings.ToLower(name) {
			t.Errorf("the level is %s, want %s", l.Level(), name)
		}
		for i, level := range levels {
			l.Log(t.Context(), level, "at "+name)
			if got, want := l.Enabled(t.Context(), level), i < visible; got != want {
				t.Errorf("at level %s a record of %s is enabled %v, want %v", name, levelName(level), got, want)
			}
		}
	}
	if err := l.SetLevel("loud"); err == nil || l.Level() != "trace" {
		t.Errorf("an unknown level gives %v and level %s", err, l.Level())
	}
	flush(t, l)
	for visible, name := range []string{"off", "Error", "WARN", "info", "debug", "trace"} {
		if got := strings.Count(out.String(), "at "+name+"\n"); got != visible {
			t.Errorf("at level %s there are %d records, want %d", name, got, visible)
		}
	}
}

func TestOptionErrors(t *testing.T) {
	for _, o := range []Options{{Level: "loud"}, {Format: "xml"}, {File: "/dev/null/a.log"}} {
		if l, err := New(o); err == nil {
			flush(t, l)
			t.Errorf("%+v is no error", o)
		}
	}
}

func TestJournal(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var st syscall.Stat_t
	if err := syscall.Fstat(int(w.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	for stream, want := range map[string]string{
		fmt.Sprintf("%d:%d", st.Dev, st.Ino): "<3>ERROR a k=v\n<4>WARN b\n<6>INFO c\n<7>DEBUG d\n",
		"1:1":                                "[",
	} {
		t.Setenv("JOURNAL_STREAM", stream)
		l := start(t, Options{Level: "debug", Out: w})
		l.Error("a", "k", "v")
		l.Warn("b")
		l.Info("c")
		l.Debug("d")
		flush(t, l)
		got := make([]byte, 4096)
		n, err := r.Read(got)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(string(got[:n]), want) {
			t.Errorf("with JOURNAL_STREAM %s: got %q, want it to begin with %q", stream, got[:n], want)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// A gate is a writer that waits until it is opened.
type gate struct {
	open    chan struct{}
	entered sync.Once
	inside  chan struct{} // closed: somebody waits
	mu      sync.Mutex    // guards out
	out     bytes.Buffer
}

func newGate() *gate { return &gate{open: make(chan struct{}), inside: make(chan struct{})} }

func (g *gate) Write(p []byte) (int, error) {
	g.entered.Do(func() { close(g.inside) })
	<-g.open
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.out.Write(p)
}

func TestSlowWriter(t *testing.T) {
	for name, c := range map[string]struct{ records, size int64 }{
		"many records": {2 * queueRecords, 10}, "large records": {2 * queueBytes >> 16, 64 << 10},
	} {
		t.Run(name, func(t *testing.T) {
			g := newGate()
			l := start(t, Options{Out: g})
			records, size := c.records, int(c.size)
			padding := strings.Repeat("x", size)
			done := make(chan struct{})
			go func() {
				defer close(done)
				for range records {
					l.Info("record", "padding", padding)
				}
			}()
			select {
			case <-done:
			case <-time.After(patience):
				t.Fatal("a writer that waits makes the caller wait")
			}
			lost := l.Lost()
			if lost == 0 || lost == records {
				t.Fatalf("%d of %d records are lost", lost, records)
			}
			if n := l.queue.bytes.Load(); n > queueBytes {
				t.Errorf("%d bytes wait, more than %d", n, queueBytes)
			}
			close(g.open)
			flush(t, l)
			out := g.out.String()
			if got := int64(strings.Count(out, "INFO record")); got+lost != records {
				t.Errorf("%d records are written and %d lost, of %d", got, lost, records)
			}
			if want := fmt.Sprintf("WARN log records were lost records=%d\n", lost); strings.Count(out, want) != 1 {
				t.Errorf("the log has not once the line %q", want)
			}
		})
	}
}

func TestCloseIsBounded(t *testing.T) {
	g := newGate()
	l := start(t, Options{Out: g})
	l.Info("a")
	<-g.inside
	l.Info("b")
	ctx, cancel := contextWithTimeout(t, 20*time.Millisecond)
	defer cancel()
	if err := l.Close(ctx); !errors.Is(err, ctx.Err()) || !strings.Contains(err.Error(), "1 records are left") {
		t.Errorf("close with a writer that waits: %v", err)
	}
	l.Info("late")
	if l.Lost() != 1 {
		t.Errorf("%d records are lost, want the one after Close", l.Lost())
	}
	close(g.open)
	flush(t, l)
	if out := g.out.String(); !strings.Contains(out, "INFO b\n") || strings.Contains(out, "late") {
		t.Errorf("log %q", out)
	}
}

// failing fails while broken is set.
type failing struct {
	io.Writer
	mu     sync.Mutex // guards broken
	broken bool
}

func (f *failing) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.broken {
		return 0, errors.New("out of paper")
	}
	return f.Writer.Write(p)
}

func TestLossesAreReported(t *testing.T) {
	for _, format := range []string{"text", "json"} {
		var out bytes.Buffer
		f := &failing{Writer: &out, broken: true}
		l := start(t, Options{Out: f, Format: format})
		for range 3 {
			l.Info("a")
		}
		for deadline := time.Now().Add(patience); l.Lost() < 3; {
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d records are lost, want 3", format, l.Lost())
			}
			time.Sleep(time.Millisecond)
		}
		f.mu.Lock()
		f.broken = false
		f.mu.Unlock()
		l.Info("b")
		l.Info("c")
		flush(t, l)
		if n := strings.Count(out.String(), "log records were lost"); n != 1 || !strings.Contains(out.String(), "out of paper") {
			t.Errorf("%s: %d reports in %s", format, n, &out)
		}
	}
}
