package daemon

import (
	"log/slog"
	"os"
	"strings"
	"testing"

	"github.com/erofsd/erofsd/internal/testenv"
)

// Every thread is told, those that come later too.
func TestRelaxTimers(t *testing.T) {
	testenv.Root(t)
	slack := func() map[string]string {
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		values := map[string]string{}
		for _, e := range threads {
			p, err := os.ReadFile("/proc/" + e.Name() + "/timerslack_ns")
			if err != nil {
				t.Fatal(err)
			}
			values[e.Name()] = strings.TrimSpace(string(p))
		}
		return values
	}
	before := slack()
	t.Cleanup(func() {
		for thread, value := range before {
			if err := os.WriteFile("/proc/"+thread+"/timerslack_ns", []byte(value), 0o600); err != nil {
				t.Error(err)
			}
		}
	})
	RelaxTimers(slog.New(slog.DiscardHandler))
	for thread, value := range slack() {
		if value != "1000000" {
			t.Errorf("thread %s has a timer slack of %s ns", thread, value)
		}
	}
}
