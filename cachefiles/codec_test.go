package cachefiles_test

import (
	"encoding/hex"
	"math"
	"strings"
	"testing"

	. "github.com/erofsd/erofsd/cachefiles"
	"github.com/erofsd/erofsd/cachefiles/cachefilestest"
)

// What 6.1.192 and 6.12.117 sent for a mount with fsid=img1.
func TestParseCaptured(t *testing.T) {
	p, err := hex.DecodeString("00000000" + "00000000" + "2f000000" + "01000000" +
		"0b000000" + "04000000" + "06000000" + "00000000" + hex.EncodeToString([]byte("erofs,img1\x00img1")))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(p)
	want := Message{ID: 0, Op: 0, Object: 1, Key: Key{"erofs,img1", "img1"}, FD: 6}
	if err != nil || got != want {
		t.Errorf("got %+v, %v\nwant %+v", got, err, want)
	}
}

func TestParse(t *testing.T) {
	long := strings.Repeat("k", 255)
	for _, want := range []Message{
		{Op: 0, FD: 0, Key: Key{"erofs,a", "b"}},
		{ID: math.MaxUint32, Op: 0, Object: math.MaxInt32, FD: math.MaxInt32, Key: Key{"erofs," + long, long}},
		{ID: 7, Op: 0, Object: 1, FD: 3, Key: Key{"\xff\xfe", "a\x00\xff"}}, // decoded, refused later
		{ID: 7, Op: 0, Object: 1, FD: 3, Key: Key{"erofs,a", ""}},
		{ID: 8, Op: 1, Object: 2, FD: -1},
		{ID: 9, Op: 2, Object: 3, FD: -1, Off: 0, N: 4096},
		{ID: 9, Op: 2, Object: 3, FD: -1, Off: 1 << 40, N: math.MaxInt64 - 1<<40},
	} {
		p := encode(want)
		got, err := Parse(p)
		if err != nil || got != want {
			t.Errorf("got %+v, %v\nwant %+v", got, err, want)
		}
		// Invariant: whatever part of a message comes, it is refused, and the
		// descriptor is found where it is there.
		for n := range p {
			got, err := Parse(p[:n])
			if err == nil {
				t.Fatalf("%d bytes of a message of %d are taken for a message", n, len(p))
			}
			if fd := got.FD; want.Op == 0 && n >= 32 && fd != want.FD || n < 32 && fd != -1 {
				t.Fatalf("%d bytes of %d: descriptor %d, want that of %+v", n, len(p), fd, want)
			}
		}
	}
}

func TestParseMalformed(t *testing.T) {
	open := func(change func(p []byte)) []byte {
		p := cachefilestest.OpenMessage(1, 2, 3, "erofs,img", "blob")
		change(p)
		return p
	}
	for name, c := range map[string]struct {
		p  []byte
		fd int
	}{
		"empty":                   {nil, -1},
		"opcode":                  {cachefilestest.Message(1, 3, 2), -1},
		"close with payload":      {cachefilestest.Message(1, 1, 2, 0, 0, 0, 0), -1},
		"read without range":      {cachefilestest.Message(1, 2, 2), -1},
		"read with more":          {append(cachefilestest.ReadMessage(1, 2, 0, 4096), 0), -1},
		"read at 2^63":            {cachefilestest.ReadMessage(1, 2, 1<<63, 4096), -1},
		"read past 2^63":          {cachefilestest.ReadMessage(1, 2, math.MaxInt64, 1), -1},
		"read of nothing":         {cachefilestest.ReadMessage(1, 2, 4096, 0), -1},
		"length too large":        {open(func(p []byte) { p[8]++ }), 3},
		"length too small":        {open(func(p []byte) { p[8]-- }), 3},
		"length huge":             {open(func(p []byte) { p[11] = 0xff }), 3},
		"no descriptor":           {cachefilestest.OpenMessage(1, 2, -1, "erofs,img", "blob"), -1},
		"negative descriptor":     {cachefilestest.OpenMessage(1, 2, -100, "erofs,img", "blob"), -1},
		"volume too large":        {open(func(p []byte) { p[16]++ }), 3},
		"cookie too large":        {open(func(p []byte) { p[20]++ }), 3},
		"sizes wrap":              {open(func(p []byte) { copy(p[16:], "\xff\xff\xff\xff\xff\xff\xff\xff") }), 3},
		"no volume":               {open(func(p []byte) { p[16], p[20] = 0, p[20]+p[16] }), 3},
		"volume without NUL":      {open(func(p []byte) { p[32+9] = 'x' }), 3},
		"NUL inside the volume":   {open(func(p []byte) { p[32+3] = 0 }), 3},
		"NUL before the end only": {open(func(p []byte) { p[16], p[20] = p[16]+1, p[20]-1 }), 3},
	} {
		m, err := Parse(c.p)
		if err == nil || m.FD != c.fd {
			t.Errorf("%s: got %+v, %v, want an error and descriptor %d", name, m, err, c.fd)
		}
	}
}

func encode(m Message) []byte {
	switch m.Op {
	case cachefilestest.OpOpen:
		return cachefilestest.OpenMessage(m.ID, m.Object, int32(m.FD), m.Key.Volume, m.Key.Cookie)
	case cachefilestest.OpRead:
		return cachefilestest.ReadMessage(m.ID, m.Object, uint64(m.Off), uint64(m.N))
	default:
		return cachefilestest.Message(m.ID, m.Op, m.Object)
	}
}

// Whatever is decoded is what was encoded, by somebody else's code.
func FuzzParse(f *testing.F) {
	f.Add(cachefilestest.OpenMessage(0, 1, 6, "erofs,img1", "img1"))
	f.Add(cachefilestest.ReadMessage(1, 1, 4096, 131072))
	f.Add(cachefilestest.Message(2, 1, 1))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := Parse(p)
		if err != nil {
			if m.FD < -1 || m.FD >= 0 && len(p) < 32 {
				t.Fatalf("descriptor %d of %x", m.FD, p)
			}
			return
		}
		if len(p) >= 32 && m.Op == 0 {
			clear(p[28:32]) // flags, which are for later kernels
		}
		if q := encode(m); string(q) != string(p) {
			t.Fatalf("%x\nis decoded as %+v\nwhich is %x", p, m, q)
		}
	})
}

func FuzzRoundTrip(f *testing.F) {
	f.Add(uint32(0), uint32(1), int32(6), "erofs,img1", "img1", int64(0), int64(4096))
	f.Add(uint32(1<<31), uint32(1), int32(0), "", "", int64(math.MaxInt64), int64(1))
	f.Fuzz(func(t *testing.T, id, object uint32, fd int32, volume, cookie string, off, n int64) {
		m, err := Parse(cachefilestest.OpenMessage(id, object, fd, volume, cookie))
		want := Message{ID: id, Object: object, FD: int(fd), Key: Key{volume, cookie}}
		if ok := fd >= 0 && !strings.Contains(volume, "\x00"); (err == nil) != ok || ok && m != want {
			t.Errorf("OPEN: got %+v, %v, want %+v", m, err, want)
		}
		m, err = Parse(cachefilestest.ReadMessage(id, object, uint64(off), uint64(n)))
		want = Message{ID: id, Op: 2, Object: object, FD: -1, Off: off, N: n}
		if ok := off >= 0 && n > 0 && off+n >= off; (err == nil) != ok || ok && m != want {
			t.Errorf("READ: got %+v, %v, want %+v", m, err, want)
		}
	})
}
