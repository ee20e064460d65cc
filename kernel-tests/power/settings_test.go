package power

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// settings are how much is tried. CUTS, SEED and SECONDS in the environment change them.
type settings struct {
	cuts  int           // for each kernel
	each  int           // of these, at most, of one log
	seed  uint64        // of the first log
	while time.Duration // that a daemon works for a log
}

// A kernel is what cuts are tried with.
type kernel struct {
	name      string
	transport string
	images    []string // by their bootstraps
}

// newSettings are the environment's, or those given: so many cuts, at most each of one log.
func newSettings(t *testing.T, cuts, each int, while time.Duration) settings {
	t.Helper()
	const most = 50
	if os.Getenv("CUTS") != "" {
		each = most
	}
	s := settings{
		cuts:  int(number(t, "CUTS", uint64(cuts))),
		each:  each,
		seed:  number(t, "SEED", rand.Uint64()),
		while: time.Duration(number(t, "SECONDS", uint64(while/time.Second))) * time.Second,
	}
	t.Logf("SEED=%d CUTS=%d SECONDS=%d", s.seed, s.cuts, s.while/time.Second)
	return s
}

// number is a variable of the environment.
func number(t *testing.T, name string, otherwise uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// logs calls do for every log that the cuts need. They are written to file systems with
// the usual and the weak options in turn.
func (s settings) logs(do func(seed uint64, options string, cuts int)) {
	for seed, left := s.seed, s.cuts; left > 0; seed, left = seed+1, left-s.each {
		do(seed, []string{asUsual, weak}[seed%2], min(left, s.each))
	}
}
