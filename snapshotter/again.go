package snapshotter

import (
	"context"
	"errors"
	"io"
	"syscall"
	"time"
)

// Times of again.
const (
	againPause = 20 * time.Millisecond // before the second attempt; it doubles
	againTime  = 5 * time.Second       // after which there is no other one
)

// again calls do, and once more when the daemon's worker has ended below its request: its keeper
// has another one started in a moment, and whoever wants a container need not know. What do
// asks for must be the same when it is asked for twice.
func again(ctx context.Context, do func() error) error {
	begin := time.Now()
	for pause := againPause; ; pause *= 2 {
		err := do()
		if !endedBelow(err) || ctx.Err() != nil || time.Since(begin)+pause > againTime {
			return err
		}
		next := time.NewTimer(pause)
		select {
		case <-next.C:
		case <-ctx.Done():
			next.Stop()
			return err
		}
	}
}

// endedBelow reports whether a request was not answered because nobody was there any more.
func endedBelow(err error) bool {
	for _, e := range []error{syscall.ECONNRESET, syscall.ECONNREFUSED, syscall.EPIPE, io.EOF, io.ErrUnexpectedEOF} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
