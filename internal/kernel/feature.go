package kernel

import (
	"errors"
	"fmt"
	"strings"
	"sync"
)

// ErrNotSupported is what a probe's error is when the kernel, as it is built
// and configured, certainly lacks the feature.
var ErrNotSupported = errors.New("not supported by this kernel")

// An UnsupportedError says which feature is missing and what would bring it.
// It is [ErrNotSupported].
type UnsupportedError struct {
	Feature string
	Missing string  // the one thing that is missing, as "CONFIG_X" or "a cache directory on ext4"; may be empty
	Since   Version // first release that has the feature; zero: unknown
	Removed Version // first release that no longer has it; zero: none
	Err     error   // what the kernel said; may be nil
}

// Error names the missing thing; versions are added where they explain it.
func (e *UnsupportedError) Error() string {
	running, err := Running()
	return e.describe(running, err == nil)
}

func (e *UnsupportedError) describe(running Version, known bool) string {
	var s strings.Builder
	s.WriteString(e.Feature)
	s.WriteString(": not supported by this kernel")
	var zero Version
	switch {
	case known && e.Removed != zero && running.Compare(e.Removed) >= 0:
		fmt.Fprintf(&s, ": removed in linux %s, this is %s", e.Removed, running)
	case known && running.Compare(e.Since) < 0:
		fmt.Fprintf(&s, ": needs linux %s, this is %s", e.Since, running)
	case e.Missing != "":
		fmt.Fprintf(&s, ": needs %s", e.Missing)
	case e.Since != zero:
		fmt.Fprintf(&s, ": needs linux %s", e.Since)
	}
	if e.Err != nil {
		fmt.Fprintf(&s, " (%v)", e.Err)
	}
	return s.String()
}

// Is makes every UnsupportedError an [ErrNotSupported].
func (e *UnsupportedError) Is(target error) bool { return target == ErrNotSupported }

// Unwrap returns what the kernel said.
func (e *UnsupportedError) Unwrap() error { return e.Err }

// NewFeatureTest returns a function that runs probe until it has an answer, and
// returns that from then on: nil, or an *UnsupportedError when probe's error is
// [ErrNotSupported]. Any other error of probe means "could not tell"; it is
// returned and not remembered. since and removed are versions, or empty; a
// malformed one panics, being a constant of ours. The function may be called
// from several goroutines; probe then runs in one of them at a time.
func NewFeatureTest(name string, probe func() error, since, removed string) func() error {
	t := &featureTest{name: name, probe: probe, since: mustParse(since), removed: mustParse(removed)}
	return t.run
}

type featureTest struct {
	name           string
	probe          func() error
	since, removed Version

	mu   sync.Mutex // guards the rest; held while probe runs so that it runs once
	done bool
	err  error
}

func (t *featureTest) run() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.done {
		return t.err
	}
	err := t.probe()
	switch e := (*UnsupportedError)(nil); {
	case err == nil, errors.As(err, &e):
	case errors.Is(err, ErrNotSupported):
		err = &UnsupportedError{Feature: t.name, Since: t.since, Removed: t.removed}
	default:
		return fmt.Errorf("probe %s: %w", t.name, err)
	}
	t.done, t.err = true, err
	return err
}

func mustParse(s string) Version {
	if s == "" {
		return Version{}
	}
	v, err := ParseVersion(s)
	if err != nil {
		panic("kernel: internal error: " + err.Error())
	}
	return v
}
