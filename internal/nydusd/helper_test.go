package nydusd

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/testenv"
)

// hang is the operation of a helper that hangs, as one does whose mount nydusd does not answer.
const hang = "hang"

func TestMain(m *testing.M) {
	if IsHelper(os.Args) {
		if len(os.Args) > 1 && os.Args[1] == hang {
			time.Sleep(time.Hour)
		}
		os.Exit(Helper(os.Args, os.Stdout))
	}
	testenv.Main(m)
}

// TestHelper binds a directory and unmounts it; what the kernel says reaches the caller.
func TestHelper(t *testing.T) {
	testenv.Root(t)
	from, place := t.TempDir(), t.TempDir()
	var h helper
	if err := h.run(t.Context(), bindMount, from, place); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(place)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.run(t.Context(), unmount, place); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("unmount what is used: %v, want EBUSY", err)
	}
	f.Close()
	if err := h.run(t.Context(), unmount, place); err != nil {
		t.Error(err)
	}
	if mounted, err := mountinfo.Mounted(place); err != nil || mounted {
		t.Errorf("it is mounted: %v, %v", mounted, err)
	}
	if err := h.run(t.Context(), bindMount, filepath.Join(from, "no"), place); !errors.Is(err, syscall.ENOENT) {
		t.Errorf("bind what is not there: %v, want ENOENT", err)
	}
	if err := h.run(t.Context(), "nonsense", place); err == nil {
		t.Error("an unknown operation succeeds")
	}
}

// TestHelperHangs leaves when its caller does, and refuses the same place until the helper
// has ended.
func TestHelperHangs(t *testing.T) {
	var h helper
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	left := make(chan error, 1)
	go func() { left <- h.run(ctx, hang, "place") }()
	for !h.isBusy("place") {
		time.Sleep(time.Millisecond)
	}
	var refusal *api.Error
	if err := h.run(t.Context(), unmount, "place"); !errors.As(err, &refusal) || refusal.Status != 503 {
		t.Errorf("the same place: %v", err)
	}
	if err := <-left; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the caller that left: %v", err)
	}
	for h.isBusy("place") { // it was killed
		time.Sleep(time.Millisecond)
	}
}

func (h *helper) isBusy(place string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.busy[place]
}
