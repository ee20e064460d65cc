package debian

import (
	"strings"
	"testing"
)

func TestTailHidesMirrors(t *testing.T) {
	got := string(tail([]byte("one\ntwo\n3\n4\n5\nE: cannot fetch https://user:secret@mirror.example/x  404\n")))
	if want := "two\n3\n4\n5\nE: cannot fetch (mirror)  404"; got != want || strings.Contains(got, "secret") {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestEnsureNeedsNothing(t *testing.T) {
	asked := func(s string) { t.Errorf("it wants to install: %s", s) }
	if err := Ensure(t.Context(), asked, Tool{"go", "no-such-package"}); err != nil {
		t.Error(err)
	}
}
