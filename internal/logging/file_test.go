package logging

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/testenv"
)

func contextWithTimeout(t *testing.T, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), d)
}

func TestFile(t *testing.T) {
	for given, want := range map[string]string{"a/b/nydusd": "nydusd.log", "a/b/nydusd.txt": "nydusd.txt"} {
		name := filepath.Join(t.TempDir(), given)
		for _, message := range []string{"first", "second"} {
			l := start(t, Options{File: name, Out: nil})
			l.Info(message)
			flush(t, l)
		}
		path := filepath.Join(filepath.Dir(name), want)
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(text, []byte("INFO first\n")) || !bytes.Contains(text, []byte("INFO second\n")) {
			t.Errorf("%s holds %q, want what both loggers wrote", path, text)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v (%v), want 0600", path, st.Mode(), err)
		}
	}
}

// settled waits until dir has no rotated file that is not compressed.
func settled(t *testing.T, dir string) (zipped []string) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		all, err := filepath.Glob(filepath.Join(dir, "*_r2*"))
		if err != nil {
			t.Fatal(err)
		}
		zipped, err = filepath.Glob(filepath.Join(dir, "*_r2*.log.gz"))
		if err != nil {
			t.Fatal(err)
		}
		if len(all) == len(zipped) {
			return zipped
		}
		if time.Now().After(deadline) {
			t.Fatalf("not compressed after %v: %q", patience, all)
		}
	}
}

func unzip(t *testing.T, name string) string {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zip, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(zip)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestRotation(t *testing.T) {
	dir := t.TempDir()
	stranger := filepath.Join(dir, "nydusd_recent.log")
	half := filepath.Join(dir, "nydusd_r2020-01-01_00-00-00.log.gz.tmp")
	for _, name := range []string{stranger, half} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const records, limit = 300, 2000
	l := start(t, Options{File: filepath.Join(dir, "nydusd.log"), RotationSize: limit, Keep: records})
	for i := range records {
		l.Info("record", "i", i)
	}
	waitEmpty(t, l)
	names := settled(t, dir)
	flush(t, l)
	live, err := os.ReadFile(filepath.Join(dir, "nydusd_rCURRENT.log"))
	if err != nil {
		t.Fatal(err)
	}
	named := regexp.MustCompile(`^nydusd_r\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(\.restart-\d{4})?\.log\.gz$`)
	var all strings.Builder
	for _, name := range names {
		if !named.MatchString(filepath.Base(name)) {
			t.Errorf("a rotated file is called %s", name)
		}
		text := unzip(t, name)
		if len(text) > limit {
			t.Errorf("%s has %d bytes, more than %d", name, len(text), limit)
		}
		all.WriteString(text)
	}
	all.Write(live)
	var want strings.Builder
	for i := range records {
		fmt.Fprintf(&want, "INFO record i=%d\n", i)
	}
	got := regexp.MustCompile(`(?m)^\[[^]]*\] `).ReplaceAllString(all.String(), "")
	if got != want.String() {
		t.Errorf("the files together hold %d bytes of records, want %d, each once and in order", len(got), want.Len())
	}
	if _, err := os.Stat(stranger); err != nil {
		t.Error("a file that is no rotated one is gone")
	}
	if _, err := os.Stat(half); err == nil {
		t.Error("a half compressed file of an earlier process is still there")
	}
}

// waitEmpty waits until everything is written.
func waitEmpty(t *testing.T, l *Logger) {
	t.Helper()
	for deadline := time.Now().Add(patience); l.queue.bytes.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the queue does not become empty")
		}
	}
}

func TestRotationKeeps(t *testing.T) {
	for keep, want := range map[int]int{0: 10, 3: 3} {
		dir := t.TempDir()
		l := start(t, Options{File: filepath.Join(dir, "a.log"), RotationSize: 200, Keep: keep})
		var names []string
		for i := range 100 {
			l.Info("record", "i", i)
			if i%10 == 9 {
				waitEmpty(t, l)
				names = settled(t, dir)
			}
		}
		for deadline := time.Now().Add(patience); len(names) != want && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			names = settled(t, dir)
		}
		if len(names) != want {
			t.Errorf("keep %d: %d rotated files, want %d", keep, len(names), want)
		}
		flush(t, l)
		if newest := unzip(t, names[len(names)-1]); !strings.Contains(newest, "i=9") {
			t.Errorf("keep %d: the newest rotated file holds %q", keep, newest)
		}
	}
}

func TestFileIsMoved(t *testing.T) {
	name := filepath.Join(t.TempDir(), "a.log")
	l := start(t, Options{File: name})
	l.Info("before")
	waitEmpty(t, l)
	time.Sleep(time.Millisecond)
	if err := os.Rename(name, name+".1"); err != nil {
		t.Fatal(err)
	}
	l.Info("after")
	flush(t, l)
	text, err := os.ReadFile(name)
	if err != nil || !strings.HasSuffix(string(text), "INFO after\n") {
		t.Errorf("the new file holds %q (%v)", text, err)
	}
}

func TestConcurrentWriters(t *testing.T) {
	dir := t.TempDir()
	l := start(t, Options{File: filepath.Join(dir, "a.log"), RotationSize: 4 << 10, Keep: 1000})
	const writers, records = 8, 200
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range records {
				l.With("w", w).Info("record", "i", i)
				_ = l.SetLevel([]string{"info", "debug"}[i%2])
			}
		})
	}
	wg.Wait()
	waitEmpty(t, l)
	names := settled(t, dir)
	flush(t, l)
	live, err := os.ReadFile(filepath.Join(dir, "a_rCURRENT.log"))
	if err != nil {
		t.Fatal(err)
	}
	text := string(live)
	for _, name := range names {
		text += unzip(t, name)
	}
	whole := regexp.MustCompile(`(?m)^\[[^]]*\] INFO record w=\d i=\d+$`)
	if got := len(whole.FindAllString(text, -1)); got != writers*records || strings.Count(text, "\n") != got {
		t.Errorf("%d whole records in %d lines, want %d", got, strings.Count(text, "\n"), writers*records)
	}
}

// TestFullDisk fills a small file system: records are lost, nobody waits, no half record
// stays, and it goes on when there is space.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	for name, limit := range map[string]int64{"plain": 0, "rotated": 16 << 10} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
				testenv.Need(t, "root", "needs to mount: "+err.Error())
			}
			defer func() {
				if err := syscall.Unmount(dir, 0); err != nil {
					t.Error(err)
				}
			}()
			filler := filepath.Join(dir, "filler")
			if err := os.WriteFile(filler, make([]byte, 64<<10), 0o600); err != nil {
				t.Fatal(err)
			}
			l := start(t, Options{File: filepath.Join(dir, "a.log"), RotationSize: limit, Keep: 3})
			defer flush(t, l)
			padding := strings.Repeat("0123456789abcdef", 20)
			for i := 0; l.Lost() == 0 && i < 5000; i++ {
				l.Info("record", "padding", fmt.Sprint(i, padding))
				if i%100 == 99 {
					waitEmpty(t, l)
				}
			}
			if limit == 0 && l.Lost() == 0 {
				t.Fatal("the file system has 128 KiB, and 5000 records fit")
			}
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			l.Info("space")
			waitEmpty(t, l)
			flush(t, l)
			text, err := os.ReadFile((&file{stem: filepath.Join(dir, "a"), ext: ".log", limit: limit}).live())
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(string(text), "INFO space\n") {
				t.Error("nothing is logged after there is space again")
			}
			if limit == 0 && !strings.Contains(string(text), "WARN log records were lost records=") {
				t.Error("the loss is not told")
			}
			for line := range strings.Lines(string(text)) {
				if line[0] != '[' || line[len(line)-1] != '\n' {
					t.Errorf("half a record: %q", line)
				}
			}
		})
	}
}
