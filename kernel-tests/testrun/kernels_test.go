package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/kernel-tests/debian"
)

// TestGuestsThatCannotBe checks what a machine counts that cannot build a kernel.
func TestGuestsThatCannotBe(t *testing.T) {
	noApt := fmt.Errorf("%w flex: apt-get update\nE: long story", debian.ErrMissing)
	broken := errors.New("does not compile")
	for name, tc := range map[string]struct {
		g               *guests
		required        bool
		mustRun         string
		failed, skipped int
		says            string
	}{
		"none wanted":       {&guests{}, true, "all", 0, 0, "skipped: nothing"},
		"no QEMU":           {&guests{rows: []string{"6.1", "6.12"}, err: noApt}, false, "root", 0, 2, "kernel 6.1: missing Debian packages flex: apt-get update (1)"},
		"one kernel":        {&guests{rows: []string{"6.1"}, failed: map[string]error{"6.1": noApt}}, false, "", 0, 1, "skipped: kernel 6.1"},
		"asked for":         {&guests{rows: []string{"6.1"}, err: noApt}, true, "", 1, 0, "FAIL  kernel 6.1: missing"},
		"must run":          {&guests{rows: []string{"6.1"}, err: noApt}, false, "root,kernel-6.1", 1, 0, "E: long story"},
		"another must run":  {&guests{rows: []string{"6.1"}, err: noApt}, false, "kernel-6.12", 0, 1, ""},
		"a broken source":   {&guests{rows: []string{"6.1"}, failed: map[string]error{"6.1": broken}}, false, "", 1, 0, "FAIL  kernel 6.1: does not compile"},
		"everything has to": {&guests{rows: []string{"6.1"}, err: noApt}, false, "all", 1, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("TEST_MUST_RUN", tc.mustRun)
			var out strings.Builder
			s := newSummary(&out)
			if err := s.guests(t.Context(), tc.g, tc.required); err != nil {
				t.Fatal(err)
			}
			s.print()
			if s.failed != tc.failed || s.skipped != tc.skipped || !strings.Contains(out.String(), tc.says) {
				t.Errorf("%d failed, %d skipped, want %d and %d and %q in\n%s", s.failed, s.skipped, tc.failed, tc.skipped, tc.says, out.String())
			}
		})
	}
}
