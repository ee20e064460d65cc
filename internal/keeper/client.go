package keeper

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// envSocket tells a worker the numbers of its descriptors: "SOCKET" or "SOCKET:JOURNAL".
const envSocket = "EROFSD_KEEPER"

// envReturns tells a worker that a service manager keeps what the keeper holds.
const envReturns = "EROFSD_KEEPER_RETURNS"

// journalName is the entry whose file a worker inherits, so that it has it from its first
// moment.
const journalName = "journal"

// abortTime is how long an Upgrade that was given up waits for the keeper to know.
const abortTime = time.Second

// An Entry is what the keeper holds for the worker: bytes, a descriptor, or both, under a
// name. The name has 1 to MaxName bytes, the data up to MaxData. An open file must not be
// in two entries: a service manager keeps it only once.
type Entry struct {
	Name string
	Data []byte
	File *os.File
}

// A Client is the worker's end. All methods are safe for concurrent use.
type Client struct {
	// StateVersion is the version of what this worker puts and understands. Set it
	// before Entries; in an Upgrade it must be the keeper's Options.StateVersion.
	StateVersion string

	conn    *net.UnixConn
	turn    chan struct{} // whoever has put something in may write
	gone    chan struct{} // closed when nothing comes any more
	returns bool
	every   time.Duration // between two signs of life, 0: none are wanted
	done    chan struct{} // closed when read has ended

	mu      sync.Mutex // guards what follows
	journal *os.File
	last    uint32           // id
	calls   map[uint32]*call // that wait for an answer
}

// A call is a request that waits.
type call struct {
	entries  []Entry       // that came so far
	err      error         // the answer
	answered chan struct{} // closed with the answer
}

// errGone is what a request gets when there is no keeper any more: Gone is closed then.
var errGone = errors.New("the keeper is dead")

// Connect returns the worker's end when a keeper started this process, nil when none did.
// Call it before anything starts another process: what says so is taken out of the
// environment, and what was inherited becomes close-on-exec.
func Connect() (*Client, error) {
	value, found := os.LookupEnv(envSocket)
	if !found {
		return nil, nil
	}
	if err := os.Unsetenv(envSocket); err != nil {
		return nil, err
	}
	_, returns := os.LookupEnv(envReturns)
	if err := os.Unsetenv(envReturns); err != nil {
		return nil, err
	}
	alive, _ := os.LookupEnv(envAlive)
	if err := os.Unsetenv(envAlive); err != nil {
		return nil, err
	}
	every, _ := time.ParseDuration(alive) // an older keeper wants none
	var fds []int
	for s := range strings.SplitSeq(value, ":") {
		fd, err := strconv.Atoi(s)
		if err != nil || fd < 0 || len(fds) == 2 {
			return nil, fmt.Errorf("connect to the keeper: %s is %q, which no keeper writes; unset it", envSocket, value)
		}
		unix.CloseOnExec(fd)
		fds = append(fds, fd)
	}
	conn, err := connOf(os.NewFile(uintptr(fds[0]), strconv.Itoa(fds[0])))
	if err != nil {
		return nil, fmt.Errorf("connect to the keeper: %w", err)
	}
	c := newClient(conn)
	c.returns, c.every = returns, every
	if len(fds) == 2 {
		c.journal = os.NewFile(uintptr(fds[1]), journalName)
	}
	return c, nil
}

func newClient(conn *net.UnixConn) *Client {
	c := &Client{
		conn: conn, turn: make(chan struct{}, 1), gone: make(chan struct{}), done: make(chan struct{}),
		calls: make(map[uint32]*call),
	}
	go c.read() // ends with the connection; Close waits for it
	return c
}

// Close ends the connection, as the worker's exit does. The keeper kills a worker that
// goes on without one.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	return err
}

// Gone is closed when the keeper is dead. The worker may go on without it, but where the
// keeper Returns what it does not hold yet is lost.
func (c *Client) Gone() <-chan struct{} { return c.gone }

// Returns reports whether a service manager keeps what the keeper holds. If the keeper
// dies, the next one kills this worker and starts another.
func (c *Client) Returns() bool { return c.returns }

// Journal is the file of the entry called "journal", nil when there is none. It is there
// before Entries, except in a successor that waits for its predecessor's end (Upgrade).
// Entries lists the very same file.
func (c *Client) Journal() *os.File {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.journal
}

// Entries says hello and returns what the predecessor left, in the order of their first
// Put. It waits for the predecessor's end in an Upgrade. Their files are the caller's, and
// close-on-exec. Call it once, before any other request but End.
func (c *Client) Entries(ctx context.Context) ([]Entry, error) {
	list, err := c.call(ctx, message{op: opHello, name: c.StateVersion, data: []byte{format}}, nil)
	if err != nil {
		return nil, fmt.Errorf("receive what the keeper holds: %w", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, e := range list {
		if e.Name != journalName || e.File == nil {
			continue
		}
		if c.journal != nil {
			e.File.Close() // the inherited one is the same file
			list[i].File = c.journal
		}
		c.journal = list[i].File
	}
	return list, nil
}

// Put makes the keeper hold e, in the place of what it has under that name, and returns
// when it does; the file may be closed then. After an error it may hold either.
func (c *Client) Put(ctx context.Context, e Entry) error {
	if len(e.Name) == 0 || len(e.Name) > MaxName || len(e.Data) > MaxData {
		return fmt.Errorf("put %.40q: a name of %d bytes with %d bytes of data, the limits are %d and %d",
			e.Name, len(e.Name), len(e.Data), MaxName, MaxData)
	}
	if _, err := c.call(ctx, message{op: opPut, name: e.Name, data: e.Data}, e.File); err != nil {
		return fmt.Errorf("have the keeper hold %q: %w", e.Name, err)
	}
	return nil
}

// Drop makes the keeper let go of an entry. One that it does not hold is no error.
func (c *Client) Drop(ctx context.Context, name string) error {
	if _, err := c.call(ctx, message{op: opDrop, name: name}, nil); err != nil {
		return fmt.Errorf("have the keeper drop %q: %w", name, err)
	}
	return nil
}

// Ready tells the keeper that the worker serves.
func (c *Client) Ready(ctx context.Context) error { return c.tell(ctx, opReady, "ready") }

// AliveEvery is how often the keeper wants to be told that the worker is alive, from before
// it is ready; 0: never.
func (c *Client) AliveEvery() time.Duration { return c.every }

// Alive tells the keeper that the worker is alive. One that has told it so, and then does
// not for Options.HangTimeout, is killed.
func (c *Client) Alive(ctx context.Context) error { return c.tell(ctx, opAlive, "alive") }

// End tells the keeper that the worker ends in order: its exit is the keeper's, with the
// same code, and everything that is held is released then.
func (c *Client) End(ctx context.Context) error { return c.tell(ctx, opEnd, "ending") }

// Yield tells the keeper that the worker ends so that its successor can begin.
func (c *Client) Yield(ctx context.Context) error { return c.tell(ctx, opYield, "yielding") }

func (c *Client) tell(ctx context.Context, o op, what string) error {
	if _, err := c.call(ctx, message{op: o}, nil); err != nil {
		return fmt.Errorf("tell the keeper that the worker is %s: %w", what, err)
	}
	return nil
}

// Upgrade has the keeper replace this worker by one from the executable at path, "" for
// what is now where this worker's came from. With nil the successor waits for this
// worker's end, which must stop, Yield and exit within Options.YieldTimeout. With an
// error, ctx's too, everything is as before.
func (c *Client) Upgrade(ctx context.Context, path string) error {
	var err error
	if path == "" {
		path, err = os.Executable()
	}
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err == nil {
		_, err = c.call(ctx, message{op: opUpgrade, data: []byte(path)}, nil)
	}
	if err == nil {
		return nil
	}
	if ctx.Err() != nil { // else it would be killed for not yielding
		abort, cancel := context.WithTimeout(context.WithoutCancel(ctx), abortTime)
		defer cancel()
		_, aerr := c.call(abort, message{op: opAbort}, nil)
		err = errors.Join(err, aerr)
	}
	return fmt.Errorf("upgrade to %s: %w", path, err)
}

// call sends m with file and waits for the answer.
func (c *Client) call(ctx context.Context, m message, file *os.File) ([]Entry, error) {
	wait := &call{answered: make(chan struct{})}
	c.mu.Lock()
	c.last++
	if c.last == 0 {
		c.last = 1 // 0 answers what had no id
	}
	m.id = c.last
	c.calls[m.id] = wait
	c.mu.Unlock()

	err := withFD(file, func(fd int) error {
		m.fd = fd
		return c.write(ctx, m)
	})
	if err == nil || errors.Is(err, errGone) { // what cannot be sent any more may be known here before read knows
		select {
		case <-wait.answered:
		case <-ctx.Done():
			err = ctx.Err()
		case <-c.gone:
			err = errGone
		}
	}
	return c.finish(m.id, wait, err)
}

// finish ends a call: with its answer if that has come, else with err.
func (c *Client) finish(id uint32, wait *call, err error) ([]Entry, error) {
	c.mu.Lock()
	delete(c.calls, id) // from here on read leaves it alone
	c.mu.Unlock()
	select {
	case <-wait.answered:
		err = wait.err
	default:
	}
	if err == nil {
		return wait.entries, nil
	}
	for _, e := range wait.entries {
		if e.File != nil {
			e.File.Close()
		}
	}
	return nil, err
}

// write sends m whole or not at all.
func (c *Client) write(ctx context.Context, m message) error {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-c.turn }()
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.conn.SetWriteDeadline(past()) // on a closed connection the write has ended anyway
		close(expired)
	})
	err := send(c.conn, m)
	if !stop() {
		<-expired
		err = errors.Join(err, c.conn.SetWriteDeadline(time.Time{}))
	}
	if ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded) {
		return ctx.Err()
	}
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return errGone
	}
	return err
}

// read gives answers to those who wait for them, until the connection ends.
func (c *Client) read() {
	defer close(c.done)
	defer close(c.gone)
	for r := newReceiver(c.conn); ; {
		m, err := r.next()
		var bad *badMessage
		switch {
		case errors.As(err, &bad):
			c.spoil(bad)
		case err != nil:
			return
		default:
			c.deliver(m)
		}
	}
}

// spoil has a call fail, part of whose answer did not arrive: it could miss an entry.
func (c *Client) spoil(bad *badMessage) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if wait := c.calls[bad.id]; wait != nil {
		wait.err = bad
	}
}

func (c *Client) deliver(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	wait := c.calls[m.id]
	if wait == nil { // given up
		if m.fd >= 0 {
			closeAll([]int{m.fd})
		}
		return
	}
	switch m.op {
	case opEntry:
		e := Entry{Name: m.name, Data: slices.Clone(m.data)}
		if m.fd >= 0 {
			e.File = os.NewFile(uintptr(m.fd), m.name)
		}
		wait.entries = append(wait.entries, e)
		return
	case opFailed:
		wait.err = errors.Join(wait.err, errors.New(string(m.data)))
	}
	delete(c.calls, m.id)
	close(wait.answered)
}
