package rootfs

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestSources(t *testing.T) {
	etc := t.TempDir()
	files := map[string]string{
		"sources.list":                "# nothing\n",
		"sources.list.d/old.list":     "deb [signed-by=/k] http://h/debian bookworm-security bookworm main contrib\n",
		"sources.list.d/deb.sources":  "Types: deb\nURIs: http://h/debian\nSuites: bookworm bookworm-updates\nComponents: main\n",
		"sources.list.d/vendor.list":  "deb http://h/linux/debian bookworm stable\n",
		"sources.list.d/next.sources": "Types: deb\nURIs: http://h/debian\nSuites: trixie\nComponents: main\n",
	}
	for name, text := range files {
		name = filepath.Join(etc, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := sources(etc)
	want := []string{filepath.Join(etc, "sources.list.d/old.list"), filepath.Join(etc, "sources.list.d/deb.sources")}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("sources are %q, error %v, want %q", got, err, want)
	}
}

func TestFollowHidesMirrors(t *testing.T) {
	var steps []string
	tail, err := follow(strings.NewReader("I: downloading\nErr: https://user:secret@mirror.example/x 404\n"),
		func(s string) { steps = append(steps, s) })
	if err != nil || !slices.Equal(steps, []string{"mmdebstrap: downloading"}) {
		t.Errorf("steps %q, error %v", steps, err)
	}
	if strings.Contains(tail, "example") || !strings.Contains(tail, "404") {
		t.Errorf("the last lines are %q: want the error without the address", tail)
	}
}
