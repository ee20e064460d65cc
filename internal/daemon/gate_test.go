package daemon

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestGate: a successor comes after the last process that has to do with a helper, and
// nobody calls one while it looks.
func TestGate(t *testing.T) {
	root := t.TempDir()
	images := filepath.Join(root, "images")
	if err := os.Mkdir(images, 0o700); err != nil {
		t.Fatal(err)
	}
	d := &Daemon{o: Options{Root: root}, log: slog.New(slog.DiscardHandler)}
	caller, err := enterGate(images)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.FcntlInt(caller.Fd(), unix.F_DUPFD_CLOEXEC, 0) // as a helper has it
	if err != nil {
		t.Fatal(err)
	}
	helper := os.NewFile(uintptr(fd), "gate")
	another, err := enterGate(images)
	if err != nil {
		t.Fatalf("two calls at a time: %v", err)
	}
	caller.Close()
	another.Close()
	soon, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := d.passGate(soon); err == nil {
		t.Error("the next worker does not wait for a helper")
	}
	passed := make(chan error, 1)
	go func() { passed <- d.passGate(t.Context()) }()
	time.AfterFunc(20*time.Millisecond, func() { helper.Close() })
	if err := <-passed; err != nil {
		t.Error(err)
	}

	successor, err := os.Open(images)
	if err != nil {
		t.Fatal(err)
	}
	defer successor.Close()
	if err := unix.Flock(int(successor.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Fatalf("the gate is not free: %v", err)
	}
	if f, err := enterGate(images); !errors.Is(err, unix.EWOULDBLOCK) {
		t.Errorf("a helper is called while a successor looks: %v, %v", f, err)
	}
}
