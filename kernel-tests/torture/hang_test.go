package torture

import (
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/daemon"
)

// envHang is the keeper's HangTimeout.
const envHang = "EROFSD_TORTURE_HANG"

// hangTimeout is what envHang says, 0 if nothing.
func hangTimeout() time.Duration {
	d, _ := time.ParseDuration(os.Getenv(envHang))
	return d
}

// TestHang stops the worker again and again below readers. The keeper notices that it does
// not live, and its successor answers what it left.
func TestHang(t *testing.T) {
	way := transport(t)
	seed := newSeed(t)
	r := rand.New(rand.NewPCG(seed, 0))
	one := newImage(t, seed, 120, "zstd")
	m := startAs(t, scratch(t), daemon.Options{Transport: way, FillTimeout: patience, NoCompletion: true}, func(cmd *exec.Cmd) {
		cmd.Env = append(cmd.Environ(), envHang+"=1s")
	})
	point := m.mount(one, "one")
	s := &score{}
	for n := range rounds(t, 3) {
		deaths := m.deaths()
		end := s.load(one, point, readersAtOnce, r.Uint64())
		before := s.reads.Load()
		m.await("a read", func() bool { return s.reads.Load() > before+r.Int64N(20) })
		m.kill(syscall.SIGSTOP)
		m.await("a successor", func() bool { return m.deaths() > deaths && m.Health(context.Background()) == nil })
		end(t, m)
		if t.Failed() {
			t.Fatalf("round %d: %s", n, s)
		}
	}
	s.readers(one, point, 2, seed)(t, m) // and all is there afterwards
	m.unmount(point)
	m.stop()
	t.Log(s)
}
