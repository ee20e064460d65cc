package cachefiles

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"
)

// An Object is a file that the kernel has open or is opening. Its methods are
// called from several goroutines. A panic in one of them counts as an error.
type Object interface {
	// Size is what the kernel is told, in bytes. It must be a pure function of the
	// key: with another size the kernel throws away what it has of the object. It
	// is rounded up to 4096.
	Size() int64
	// Opened hands over the file, once, when the kernel has accepted the size and
	// before any Fill. It may use f already. After an error every Fill of the
	// object fails without being called.
	Opened(ctx context.Context, f *File) error
	// Fill makes [off, off+n) present in the file; a nil error lets the reader
	// see it. The range may reach past Size, up to the next page: zeros belong
	// there. It returns soon after ctx is done.
	Fill(ctx context.Context, off, n int64) error
	// Close is the last call, after every Opened and Fill has returned. It does not
	// close the file: the server does, afterwards.
	Close() error
}

// A Handler finds objects.
type Handler interface {
	// Open finds the object of a key. An error refuses it: the kernel is told the
	// syscall.Errno in it, or EIO. It is called again for the same key whenever
	// the kernel opens it anew (after a restart, or because its file was lost),
	// also while an older object of the key is not closed yet.
	//
	// What was accepted once should be again, and its Fill fail instead: a reader
	// that waits for an object that is refused makes the kernel ask for ever. For
	// that reason a key that is refused again and again is answered slower, up to a
	// second each time.
	Open(ctx context.Context, k Key) (Object, error)
}

// An Op is a request of the kernel.
type Op string

const (
	OpOpen  Op = "open"  // to the answer: Handler.Open
	OpRead  Op = "read"  // to the answer: the wait for a place, Opened and Fill
	OpClose Op = "close" // to the end: the wait for fills, and Object.Close
)

// Options for a server. The zero value works.
type Options struct {
	// Logger gets failed requests (limited to some per second) and what should
	// not happen. nil: nothing is logged.
	Logger *slog.Logger
	// Observer is told of every request when it has been dealt with: the time
	// since it was read from the device, and the error of a failed one. It must
	// not wait. nil: nobody is told.
	Observer func(op Op, d time.Duration, err error)
	// MaxInFlight bounds the READs that wait for Fill, each with a goroutine.
	// Further READs wait in a queue. Default 1024.
	MaxInFlight int
	// MaxInFlightBytes bounds the sum of their ranges, in bytes; one READ is
	// always let in. Default 256 MiB.
	MaxInFlightBytes int64
	// Deadline is the time that one OPEN or READ gets, from its arrival to the
	// answer. Then it fails; the next read of an application tries anew. Default
	// 60 s.
	Deadline time.Duration
	// Handover leaves requests unanswered that are still under way Grace after the
	// end of Serve's context, for a successor that calls [Device.Restore]; somebody
	// else must hold the device meanwhile. Otherwise their readers get EIO.
	Handover bool
	// Grace is the time that requests under way get when Serve ends. Default 5 s.
	Grace time.Duration
}

func (o *Options) setDefaults() {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.MaxInFlight <= 0 {
		o.MaxInFlight = 1024
	}
	if o.MaxInFlightBytes <= 0 {
		o.MaxInFlightBytes = 256 << 20
	}
	if o.Deadline <= 0 {
		o.Deadline = time.Minute
	}
	if o.Grace <= 0 {
		o.Grace = 5 * time.Second
	}
}

// Stats counts since the server was made.
type Stats struct {
	Requests  int64 // messages read, malformed ones included
	Opens     int64 // OPENs
	Refused   int64 // OPENs answered with an error
	Closes    int64 // CLOSEs
	Reads     int64 // READs of known objects: Filled + Failed + Dropped + InFlight
	Filled    int64 // READs completed after Fill
	Failed    int64 // READs completed without data: their readers got EIO
	Dropped   int64 // READs not answered: their object was closed meanwhile, or a successor restores them
	Unknown   int64 // READs and CLOSEs of unknown objects; the reader of such a READ waits for ever
	Malformed int64 // messages that could not be decoded
	ReadFails int64 // requests that the kernel failed itself when they were read, as for want of a descriptor
	Lost      int64 // answers that the kernel did not take: mostly because the reader was killed
	PollCull  int64 // how often, at most once a second, the kernel was seen to want something culled
	InFlight  int64 // READs under way now, those in the queue included
	Objects   int64 // objects now, those included that are being opened or closed
}

type counters struct {
	requests, opens, refused, closes, reads, filled, failed, dropped     atomic.Int64
	unknown, malformed, readFails, lost, pollCull, inFlight, objectsLive atomic.Int64
}

// Stats returns the counters. They are read one by one.
func (s *Server) Stats() Stats {
	c := &s.count
	return Stats{
		Requests: c.requests.Load(), Opens: c.opens.Load(), Refused: c.refused.Load(), Closes: c.closes.Load(),
		Reads: c.reads.Load(), Filled: c.filled.Load(), Failed: c.failed.Load(), Dropped: c.dropped.Load(),
		Unknown: c.unknown.Load(), Malformed: c.malformed.Load(), ReadFails: c.readFails.Load(),
		Lost: c.lost.Load(), PollCull: c.pollCull.Load(), InFlight: c.inFlight.Load(), Objects: c.objectsLive.Load(),
	}
}
