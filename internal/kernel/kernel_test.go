package kernel

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestParseVersion(t *testing.T) {
	for s, want := range map[string]Version{
		"6.14":                     {6, 14, 0},
		"6.18.44":                  {6, 18, 44},
		"6.1.0-13-amd64":           {6, 1, 0},
		"7.2-rc1":                  {7, 2, 0},
		"7.2.0-rc1+":               {7, 2, 0},
		"5.10.134-12.al8.x86_64":   {5, 10, 134},
		"6.18.44.1":                {6, 18, 44},
		"6":                        {},
		"":                         {},
		"six":                      {},
		"6.":                       {},
		"6.x":                      {},
		".6.1":                     {},
		"99999999999999999999.1.2": {},
	} {
		got, err := ParseVersion(s)
		if got != want || (err != nil) != (want == Version{}) {
			t.Errorf("ParseVersion(%q) = %v, %v, want %v", s, got, err, want)
		}
	}
}

func TestVersionOrder(t *testing.T) {
	order := []Version{{}, {5, 19, 0}, {6, 1, 0}, {6, 1, 192}, {6, 14, 0}, {7, 0, 7}}
	for i, v := range order {
		for j, w := range order {
			want := 0
			if i < j {
				want = -1
			} else if i > j {
				want = 1
			}
			if got := v.Compare(w); got != want {
				t.Errorf("%v.Compare(%v) = %d, want %d", v, w, got, want)
			}
		}
	}
}

func TestRunning(t *testing.T) {
	v, err := Running()
	if err != nil || v.Compare(Version{3, 0, 0}) < 0 {
		t.Fatalf("Running() = %v, %v", v, err)
	}
}

func TestUnsupportedErrorNamesTheMissingThing(t *testing.T) {
	running := Version{6, 12, 3}
	for _, c := range []struct {
		err  UnsupportedError
		want string
	}{
		{UnsupportedError{Feature: "x"}, "x: not supported by this kernel"},
		{UnsupportedError{Feature: "x", Since: Version{6, 14, 0}, Missing: "CONFIG_X"}, "x: not supported by this kernel: needs linux 6.14, this is 6.12.3"},
		{UnsupportedError{Feature: "x", Since: Version{6, 1, 0}, Missing: "CONFIG_X"}, "x: not supported by this kernel: needs CONFIG_X"},
		{UnsupportedError{Feature: "x", Since: Version{6, 1, 0}}, "x: not supported by this kernel: needs linux 6.1"},
		{UnsupportedError{Feature: "x", Removed: Version{6, 12, 0}}, "x: not supported by this kernel: removed in linux 6.12, this is 6.12.3"},
		{UnsupportedError{Feature: "x", Missing: "y", Err: fs.ErrInvalid}, "x: not supported by this kernel: needs y (invalid argument)"},
	} {
		if got := c.err.describe(running, true); got != c.want {
			t.Errorf("got  %s\nwant %s", got, c.want)
		}
	}
	err := error(&UnsupportedError{Err: fs.ErrInvalid})
	if !errors.Is(err, ErrNotSupported) || !errors.Is(err, fs.ErrInvalid) || errors.Is(err, fs.ErrExist) {
		t.Error("an UnsupportedError is ErrNotSupported and what the kernel said, nothing else")
	}
}

// The three outcomes: works and lacks are remembered, "could not tell" is not.
func TestFeatureTest(t *testing.T) {
	refused := errors.New("no descriptors left")
	runs, outcome := 0, refused
	test := NewFeatureTest("thing", func() error { runs++; return outcome }, "6.14", "")
	for range 2 {
		if err := test(); !errors.Is(err, refused) || errors.Is(err, ErrNotSupported) {
			t.Fatalf("undecided probe: %v", err)
		}
	}
	outcome = ErrNotSupported
	first := test()
	outcome = nil
	var e *UnsupportedError
	if err := test(); err != first || !errors.As(err, &e) || e.Feature != "thing" || e.Since != (Version{6, 14, 0}) {
		t.Fatalf("unsupported: first %v, then %v", first, err)
	}
	if runs != 3 {
		t.Fatalf("the probe ran %d times, want 3", runs)
	}

	runs = 0
	own := &UnsupportedError{Feature: "more exact"}
	test = NewFeatureTest("thing", func() error { runs++; return own }, "", "")
	for range 2 {
		if err := test(); err != error(own) {
			t.Fatalf("the probe's own UnsupportedError became %v", err)
		}
	}
	works := NewFeatureTest("thing", func() error { runs++; return nil }, "", "7.2")
	for range 2 {
		if err := works(); err != nil {
			t.Fatal(err)
		}
	}
	if runs != 2 {
		t.Fatalf("two probes with an answer ran %d times", runs)
	}
}
