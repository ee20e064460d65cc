package testenv

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

func TestLeaks(t *testing.T) {
	routines, files := goroutines(), openFiles()
	if left := leaks(routines, files, time.Second); len(left) > 0 {
		t.Fatalf("nothing was opened, and leaks reports %q", left)
	}

	f, err := os.Create(filepath.Join(t.TempDir(), "left-open"))
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	go func() { <-stop }()
	left := strings.Join(leaks(routines, files, 0), "\n")
	for _, want := range []string{"left-open", "TestLeaks"} {
		if !strings.Contains(left, want) {
			t.Errorf("leaks does not name %s:\n%s", want, left)
		}
	}

	f.Close()
	close(stop)
	if left := leaks(routines, files, time.Second); len(left) > 0 {
		t.Errorf("after everything was closed leaks reports %q", left)
	}
}
