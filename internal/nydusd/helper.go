package nydusd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/api"
)

// helperName is argv[0] of the short-lived process that mounts and unmounts. The kernel asks
// nydusd while it does so: if nydusd hangs, the helper does, and nobody else.
const helperName = "nydusd-mount"

// The operations of a helper, and their arguments.
const (
	mountErofs = "mount"   // FSID DOMAIN PLACE
	bindMount  = "bind"    // FROM PLACE
	unmount    = "unmount" // PLACE
)

// helperResult is what a helper prints.
type helperResult struct {
	Error string        `json:"error,omitempty"` // "": none
	Errno syscall.Errno `json:"errno,omitempty"`
}

// IsHelper says that this process was started as a helper: main calls [Helper] and nothing
// else.
func IsHelper(args []string) bool { return len(args) > 0 && args[0] == helperName }

// Helper is a helper's main. It returns the exit code.
func Helper(args []string, out io.Writer) int {
	var res helperResult
	if err := help(args[1:]); err != nil {
		res.Error = err.Error()
		errors.As(err, &res.Errno)
	}
	if err := json.NewEncoder(out).Encode(res); err != nil || res.Error != "" {
		return 1
	}
	return 0
}

func help(args []string) error {
	switch {
	case len(args) == 4 && args[0] == mountErofs:
		o := erofs.MountOptions{Source: sourceOf(args[2]), FSID: args[1], Domain: args[2], Target: args[3]}
		if o.Domain == o.FSID {
			o.Domain = "" // the same to the kernel, and 5.19 to 6.0 know no other
		}
		return erofs.Mount(o)
	case len(args) == 3 && args[0] == bindMount:
		if err := syscall.Mount(args[1], args[2], "", syscall.MS_BIND, ""); err != nil {
			return &os.PathError{Op: "bind", Path: args[1], Err: err}
		}
		return nil
	case len(args) == 2 && args[0] == unmount:
		return erofs.Unmount(args[1], false)
	}
	return fmt.Errorf("%s: unknown operation %q", helperName, args)
}

// A helper runs helpers, one at a time for a place. The zero value does.
type helper struct {
	mu   sync.Mutex
	busy map[string]bool // places
}

// run runs one and returns its error; errors.Is finds its errno. When ctx ends it is killed,
// and the place is busy until the kernel has let go of it.
func (h *helper) run(ctx context.Context, args ...string) error {
	place := args[len(args)-1]
	if !h.take(place) {
		return api.Unavailable(errors.New("an earlier attempt still hangs in the kernel, which waits for nydusd: see whether that answers the kernel"))
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Args = append([]string{helperName}, args...)
	cmd.Env = []string{"GOMAXPROCS=1", "GOGC=off"} // it lives for milliseconds
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		h.give(place)
		return fmt.Errorf("start %s: %w", helperName, err)
	}
	ended := make(chan error, 1)
	go func() { // which the kernel may hold longer than ctx
		err := cmd.Wait()
		h.give(place)
		ended <- err
	}()
	select {
	case err := <-ended:
		return resultOf(ctx, out.Bytes(), err)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// resultOf is the error that a helper printed, or that it ended with.
func resultOf(ctx context.Context, text []byte, ended error) error {
	var res helperResult
	if err := json.Unmarshal(text, &res); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("run %s: %w", helperName, errors.Join(ended, err))
	}
	switch {
	case res.Error == "":
		return nil
	case res.Errno != 0:
		return &helperError{res}
	}
	return errors.New(res.Error)
}

// A helperError is what a system call said in a helper.
type helperError struct{ helperResult }

func (e *helperError) Error() string { return e.helperResult.Error }

// Unwrap is the errno.
func (e *helperError) Unwrap() error { return e.Errno }

func (h *helper) take(place string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.busy == nil {
		h.busy = map[string]bool{}
	}
	if h.busy[place] {
		return false
	}
	h.busy[place] = true
	return true
}

func (h *helper) give(place string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.busy, place)
}
