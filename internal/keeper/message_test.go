package keeper

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMessage(t *testing.T) {
	for _, m := range []message{
		{op: opHello, id: 1, name: "version", data: []byte{format}, fd: -1},
		{op: opPut, id: 2, name: "n", data: []byte("data"), fd: 3},
		{op: opPut, id: 1 << 31, name: "n", fd: -1},
		{op: opDrop, id: 3, name: "n", fd: -1},
		{op: opUpgrade, id: 4, data: []byte("/path"), fd: -1},
		{op: opFailed, id: 5, data: []byte("why"), fd: -1},
		{op: opDone, id: 6, fd: -1},
	} {
		got, err := decode(m.encode(), m.files())
		if err != nil || got.op != m.op || got.id != m.id || got.name != m.name || !bytes.Equal(got.data, m.data) || got.fd != m.fd {
			t.Errorf("%+v became %+v, %v", m, got, err)
		}
	}
	for _, m := range []message{
		{op: 0, fd: -1},
		{op: opAlive + 1, fd: -1},
		{op: opPut, fd: -1},
		{op: opPut, name: string(make([]byte, MaxName+1)), fd: -1},
		{op: opPut, name: "n", data: make([]byte, MaxData+1), fd: -1},
		{op: opDrop, name: "n", data: []byte("d"), fd: -1},
		{op: opDrop, name: "n", fd: 3},
		{op: opReady, fd: 3},
		{op: opReady, name: "n", fd: -1},
		{op: opUpgrade, data: []byte("relative"), fd: -1},
		{op: opUpgrade, fd: -1},
		{op: opHello, fd: -1},
	} {
		m.id = 9
		_, err := decode(m.encode(), m.files())
		var bad *badMessage
		if !errors.As(err, &bad) || bad.id != 9 {
			t.Errorf("operation %d with a name of %d, data of %d, file %d: %v", m.op, len(m.name), len(m.data), m.fd, err)
		}
	}
}

// A bench is a keeper without processes: its loop, and a worker that is only a connection.
type bench struct {
	*keeper
	w     *worker
	conn  *net.UnixConn
	ended chan struct{}
}

func newBench(t testing.TB) *bench {
	t.Helper()
	o := Options{Command: func(string) *exec.Cmd { return exec.Command("/nowhere/at/all") }}
	o.setDefaults()
	k := &keeper{o: o, log: o.Logger, calls: make(chan task), over: make(chan struct{})}
	var err error
	if k.table, err = newTable(nil); err != nil {
		t.Fatal(err)
	}
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	conn, err := connOf(theirs)
	if err != nil {
		t.Fatal(err)
	}
	k.current = newWorker(&os.Process{}, ours, nil)
	b := &bench{keeper: k, w: k.current, conn: conn, ended: make(chan struct{})}
	b.w.own.Go(func() { k.serve(b.w); close(b.w.over) })
	b.w.own.Go(func() { k.write(b.w) })
	go func() {
		defer close(b.ended)
		for {
			select {
			case c := <-k.calls:
				c.f()
				close(c.done)
			case <-k.over:
				return
			}
		}
	}()
	return b
}

func (b *bench) close(t testing.TB) {
	t.Helper()
	b.conn.Close()
	b.w.own.Wait()
	close(b.over)
	<-b.ended
	b.w.conn.Close()
	if err := b.table.close(true); err != nil {
		t.Error(err)
	}
}

// FuzzMessage sends a packet with some descriptors: it is answered once if it has a
// number, nothing is left open, and the keeper goes on.
func FuzzMessage(f *testing.F) {
	for _, m := range []message{
		{op: opHello, id: 1, name: "v", data: []byte{format}, fd: -1},
		{op: opPut, id: 2, name: "n", data: []byte("data"), fd: 3},
		{op: opDrop, id: 3, name: "n", fd: -1},
		{op: opUpgrade, id: 4, data: []byte("/bin/true"), fd: -1},
		{op: opReady, id: 5, fd: -1},
		{op: opAbort, id: 6, fd: -1},
		{op: opYield, id: 7, fd: -1},
		{op: opEnd, id: 8, fd: -1},
		{op: opEntry, id: 9, name: "e", fd: -1},
	} {
		for n := range byte(6) {
			f.Add(m.encode(), n, n%2 == 0)
		}
	}
	f.Add([]byte{}, byte(0), true)
	f.Add(make([]byte, headerSize+MaxName+MaxData+1), byte(1), true)
	null, err := os.Open(os.DevNull)
	if err != nil {
		f.Fatal(err)
	}
	defer null.Close()
	f.Fuzz(func(t *testing.T, p []byte, files byte, greeted bool) {
		if len(p) == 0 || len(p) > 150<<10 {
			return // the end of a connection; more than a socket takes
		}
		exchange(t, p, int(files%6), greeted, null)
	})
}

func exchange(t *testing.T, p []byte, files int, greeted bool, null *os.File) {
	before := openFiles(t)
	b := newBench(t)
	answers := newReceiver(b.conn)
	next := func() message {
		t.Helper()
		b.conn.SetReadDeadline(time.Now().Add(patience))
		m, err := answers.next()
		if err != nil || m.op != opDone && m.op != opFailed {
			t.Fatalf("the answer is %+v, %v", m, err)
		}
		return m
	}
	ask := func(m message) {
		t.Helper()
		if err := send(b.conn, m); err != nil {
			t.Fatal(err)
		}
	}
	if greeted {
		ask(message{op: opHello, id: 1, data: []byte{format}, fd: -1})
		next()
	}
	fds := make([]int, files)
	for i := range fds {
		fds[i] = duplicate(t, null)
	}
	if _, _, err := b.conn.WriteMsgUnix(p, unix.UnixRights(fds...), nil); err != nil {
		t.Fatal(err)
	}
	closeAll(fds)
	ask(message{op: opDrop, id: 77, name: "probe", fd: -1})
	id := uint32(0)
	if len(p) >= headerSize {
		id = binary.LittleEndian.Uint32(p[4:])
	}
	got := []uint32{next().id, next().id} // a hello may be answered later
	if !slices.Equal(got, []uint32{id, 77}) && !slices.Equal(got, []uint32{77, id}) {
		t.Errorf("answered were %d, want %d and 77", got, id)
	}
	ask(message{op: opDrop, id: 78, name: "probe", fd: -1})
	if got := next().id; got != 78 {
		t.Errorf("answered was %d once more", got)
	}
	b.close(t)
	if after := openFiles(t); after != before {
		t.Errorf("%d descriptors are open, there were %d", after, before)
	}
}

// openFiles counts descriptors.
func openFiles(t testing.TB) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}
