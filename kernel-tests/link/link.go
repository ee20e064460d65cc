// Package link is a TCP relay that behaves like a slow link: it limits the rate,
// delays every byte and lets a new connection cost a round trip. It is for
// measurements on one machine and needs no privilege.
//
// The model: the connections share one bottleneck queue in each direction, served
// segment by segment in the order of arrival. A segment leaves the queue when the
// bytes before it and its own have passed at the link's rate, and arrives half a
// round trip later. There is no loss and no slow start.
package link

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// segmentSize is the most that one connection sends before it is another's turn.
	segmentSize = 16 << 10
	// slack is how much of the link's idle time a late segment may still use: the
	// timers of the machine wake up late, and the link must not look slower for it.
	slack = 2 * time.Millisecond
)

// Profile says what kind of link it is.
type Profile struct {
	Rate int64         // bytes per second in each direction; 0: unlimited
	RTT  time.Duration // round trip time
}

// Slow is the link of the figures in the documentation: 100 Mbit/s, 20 ms.
var Slow = Profile{Rate: 100e6 / 8, RTT: 20 * time.Millisecond}

// Stats counts what has arrived at the other end since the link was made.
type Stats struct {
	Connections int64
	Up, Down    int64 // bytes from and to the clients
}

// Link relays connections to one target. All methods are safe for concurrent use.
type Link struct {
	profile  Profile
	target   string
	listener net.Listener
	cancel   context.CancelFunc
	done     sync.WaitGroup

	up, down    queue
	connections atomic.Int64
}

// New starts a relay from a new loopback port to target (host:port).
func New(target string, p Profile) (*Link, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	l := &Link{profile: p, target: target, listener: listener, cancel: cancel}
	l.up.rate, l.down.rate = p.Rate, p.Rate
	l.done.Add(1)
	go l.accept(ctx)
	return l, nil
}

// Addr is the host:port that clients connect to.
func (l *Link) Addr() string { return l.listener.Addr().String() }

// Stats returns the counts so far.
func (l *Link) Stats() Stats {
	return Stats{Connections: l.connections.Load(), Up: l.up.bytes.Load(), Down: l.down.bytes.Load()}
}

// Close cuts all connections and waits until nothing of the relay is left.
func (l *Link) Close() error {
	l.cancel()
	err := l.listener.Close()
	l.done.Wait()
	return err
}

func (l *Link) accept(ctx context.Context) {
	defer l.done.Done()
	for {
		client, err := l.listener.Accept()
		if err != nil {
			return
		}
		l.done.Go(func() { l.relay(ctx, client.(*net.TCPConn)) })
	}
}

// relay serves one connection until both directions have ended.
func (l *Link) relay(ctx context.Context, client *net.TCPConn) {
	defer client.Close()
	l.connections.Add(1)
	if sleep(ctx, l.profile.RTT) != nil {
		return
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", l.target)
	if err != nil {
		return
	}
	server := conn.(*net.TCPConn)
	defer server.Close()
	cut := context.AfterFunc(ctx, func() {
		client.Close()
		server.Close()
	})
	defer cut()

	var both sync.WaitGroup
	both.Go(func() { l.pump(ctx, server, client, &l.up) })
	both.Go(func() { l.pump(ctx, client, server, &l.down) })
	both.Wait()
}

// A segment is on its way until it is due.
type segment struct {
	data []byte
	due  time.Time
}

// pump moves one direction of a connection through q. The end of src's stream
// arrives in order, too; an error cuts both ways.
func (l *Link) pump(ctx context.Context, dst, src *net.TCPConn, q *queue) {
	inFlight := 1 + int(l.profile.RTT.Seconds()*float64(l.profile.Rate))/segmentSize
	wire := make(chan segment, inFlight)
	var sender sync.WaitGroup
	sender.Go(func() {
		for s := range wire {
			if sleep(ctx, time.Until(s.due)) == nil {
				if _, err := dst.Write(s.data); err != nil {
					src.Close()
					continue // drains the wire so that the reader is never stuck
				}
				q.bytes.Add(int64(len(s.data)))
			}
		}
		dst.CloseWrite()
	})
	for {
		buf := make([]byte, segmentSize)
		n, err := src.Read(buf)
		if n > 0 {
			sent := q.reserve(n)
			sleep(ctx, time.Until(sent))
			if now := time.Now(); sent.Before(now) {
				sent = now
			}
			wire <- segment{buf[:n], sent.Add(l.profile.RTT / 2)}
		}
		if err != nil {
			if !errors.Is(err, io.EOF) {
				dst.Close()
			}
			break
		}
	}
	close(wire)
	sender.Wait()
}

// queue is the bottleneck of one direction, shared by all connections.
type queue struct {
	rate  int64
	bytes atomic.Int64

	mu   sync.Mutex
	free time.Time // when everything reserved so far has been sent
}

// reserve appends n bytes to the queue and returns when the last has been sent.
func (q *queue) reserve(n int) time.Time {
	now := time.Now()
	if q.rate == 0 {
		return now
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if idle := now.Add(-slack); q.free.Before(idle) {
		q.free = idle
	}
	q.free = q.free.Add(time.Duration(int64(n) * int64(time.Second) / q.rate))
	return q.free
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
