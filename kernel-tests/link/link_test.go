package link

import (
	"bytes"
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/erofsd/erofsd/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// serve starts a server that handles each connection and a link to it.
func serve(t *testing.T, p Profile, handle func(net.Conn)) *Link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				handle(conn)
			})
		}
	})
	l, err := New(listener.Addr().String(), p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		l.Close()
		listener.Close()
		all.Wait()
	})
	return l
}

func dial(t *testing.T, l *Link) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", l.Addr())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func echo(conn net.Conn) { io.Copy(conn, conn) }

// within fails t unless got is at least want and not absurdly above it: other
// work on the machine may delay a timer, nothing may make a link too fast.
func within(t *testing.T, what string, got, want time.Duration) {
	t.Helper()
	t.Logf("%s: %v, the link's own part %v", what, got, want)
	if got < want*95/100 || got > 3*want+200*time.Millisecond {
		t.Errorf("%s took %v on a link where it takes %v", what, got, want)
	}
}

func TestRoundTrips(t *testing.T) {
	p := Profile{RTT: 40 * time.Millisecond, Rate: 10e6}
	l := serve(t, p, echo)
	start := time.Now()
	conn := dial(t, l)
	buf := make([]byte, 1)
	ping := func() {
		t.Helper()
		if _, err := conn.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, buf); err != nil {
			t.Fatal(err)
		}
	}
	ping()
	within(t, "a new connection and its first answer", time.Since(start), 2*p.RTT)
	start = time.Now()
	ping()
	within(t, "the next answer", time.Since(start), p.RTT)
}

func TestRateIsShared(t *testing.T) {
	const size = 1 << 20
	p := Profile{RTT: 10 * time.Millisecond, Rate: 8 << 20}
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(data)
	l := serve(t, p, func(conn net.Conn) { conn.Write(data) })
	for _, n := range []int{1, 4} {
		before := l.Stats()
		start := time.Now()
		var all sync.WaitGroup
		for range n {
			conn := dial(t, l)
			all.Go(func() {
				got, err := io.ReadAll(conn)
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %d bytes, want the same %d bytes back, error %v", len(got), size, err)
				}
			})
		}
		all.Wait()
		within(t, "transfer", time.Since(start), time.Duration(n)*size*time.Second/time.Duration(p.Rate)+3*p.RTT/2)
		after := l.Stats()
		if after.Down-before.Down != int64(n*size) || after.Connections-before.Connections != int64(n) {
			t.Errorf("%d transfers of %d bytes counted as %+v after %+v", n, size, after, before)
		}
	}
}

func TestStreamEndsInOrder(t *testing.T) {
	l := serve(t, Profile{RTT: 5 * time.Millisecond}, func(conn net.Conn) {
		h := sha256.New()
		io.Copy(h, conn)
		conn.Write(h.Sum(nil))
	})
	conn := dial(t, l)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<14)
	if _, err := conn.Write(data); err != nil {
		t.Fatal(err)
	}
	conn.(*net.TCPConn).CloseWrite()
	got, err := io.ReadAll(conn)
	want := sha256.Sum256(data)
	if err != nil || !bytes.Equal(got, want[:]) {
		t.Errorf("the server saw a stream of sum %x, sent was %x, error %v", got, want, err)
	}
	if up := l.Stats().Up; up != int64(len(data)) {
		t.Errorf("%d bytes up counted, %d sent", up, len(data))
	}
}

func TestCloseCutsIdleConnections(t *testing.T) {
	l := serve(t, Profile{}, echo)
	conn := dial(t, l)
	if _, err := conn.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("a read through a closed link succeeds")
	}
}
