package snapshotter

import (
	"context"
	"errors"
	"io"
	"net/http"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/api"
)

// Times of again.
const (
	againPause = 20 * time.Millisecond  // before the second attempt; it doubles
	againMax   = 200 * time.Millisecond // up to this
	againTime  = 10 * time.Second       // after which there is no other one
)

// again calls do, and once more when the daemon's worker has ended below its request, or says
// that it is about to be replaced: there is another one in a moment, and whoever wants a
// container need not know. What do asks for must be the same when it is asked for twice.
func again(ctx context.Context, do func() error) error {
	begin := time.Now()
	for pause := againPause; ; pause = min(2*pause, againMax) {
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

// endedBelow reports whether a request was not answered because nobody was there any more, or
// is to be sent again.
func endedBelow(err error) bool {
	if e := (*api.Error)(nil); errors.As(err, &e) {
		return e.Status == http.StatusServiceUnavailable
	}
	for _, e := range []error{syscall.ECONNRESET, syscall.ECONNREFUSED, syscall.EPIPE, io.EOF, io.ErrUnexpectedEOF} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
