package chunk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// maxBomb bounds what a bomb may allocate: the state of the decoders, and not what the
// bomb says or has.
const maxBomb = 16 << 20

// frame is a zstd frame (RFC 8878) with a window of its own size, without a checksum, that
// says that it has size bytes and consists of n blocks which repeat a byte 128 KiB times.
func frame(window byte, size uint64, n int) []byte {
	p := []byte{0x28, 0xb5, 0x2f, 0xfd, 3 << 6, window} // an 8 byte size, no single segment
	p = binary.LittleEndian.AppendUint64(p, size)
	for i := range n {
		head := uint32(128<<10)<<3 | 1<<1
		if i == n-1 {
			head |= 1
		}
		p = append(p, byte(head), byte(head>>8), byte(head>>16), 'x')
	}
	return p
}

// TestBombs: what decodes to more than the table says, or says that it does, is an error
// and takes no memory.
func TestBombs(t *testing.T) {
	const big = 256 << 20
	var gz, zst bytes.Buffer
	gz.Write(gzipped(t, make([]byte, big)))
	w, err := zstd.NewWriter(&zst, zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(zstd.MaxWindowSize))
	if err != nil {
		t.Fatal(err)
	}
	for range big >> 20 {
		if _, err := w.Write(make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	lz4 := append([]byte{0x1f, 'x', 1, 0}, bytes.Repeat([]byte{255}, big/255)...) // a match of 256 MiB
	lz4 = append(lz4, 0, 0x50, 1, 2, 3, 4, 5)
	d := NewDecoder()
	defer d.Close()
	warm := frame(0x38, 1<<17, 1)
	if err := d.decompress(CodecZstd, make([]byte, 1<<17), warm); err != nil {
		t.Fatalf("the frame that the bombs are made of: %v", err)
	}
	for name, bomb := range map[string]struct {
		codec Codec
		src   []byte
	}{
		"zstd":                       {CodecZstd, zst.Bytes()},
		"zstd: largest window":       {CodecZstd, frame(0xff, 1<<17, 2)},
		"zstd: declares 2^62 bytes":  {CodecZstd, frame(0x50, 1<<62, 1)},
		"zstd: declares 2^64-1":      {CodecZstd, frame(0x50, math.MaxUint64, 1)},
		"zstd: declares 4 GiB":       {CodecZstd, frame(0xb0, 4<<30, 1)},
		"zstd: more than it says":    {CodecZstd, frame(0x50, 4096, 10000)},
		"zstd: 10000 frames":         {CodecZstd, bytes.Repeat(warm, 10000)},
		"zstd: skippable, then more": {CodecZstd, append([]byte{0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff}, warm...)},
		"gzip":                       {CodecGzip, gz.Bytes()},
		"gzip: 100 members":          {CodecGzip, bytes.Repeat(gzipped(t, make([]byte, 1<<20)), 100)},
		"gzip: endless name":         {CodecGzip, append([]byte{0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 0}, bytes.Repeat([]byte{'n'}, 4<<20)...)},
		"lz4":                        {CodecLZ4, lz4},
	} {
		t.Run(name, func(t *testing.T) {
			for _, n := range []int{1, 4096, 1 << 20} {
				dst := make([]byte, n)
				var err error
				allocated(t, maxBomb, func() { err = d.decompress(bomb.codec, dst, bomb.src) })
				if err == nil {
					t.Errorf("decoded into %d bytes", n)
				}
			}
		})
	}
}

// A huge is an object that says that it has so many bytes; they are zero.
type huge int64

func (h huge) Size() int64 { return int64(h) }

func (h huge) ReadAt(_ context.Context, p []byte, _ int64) error {
	if len(p) > 64<<20 {
		return errors.New("more than anybody sends")
	}
	clear(p)
	return nil
}

// TestHostileTables: an entry that says too much of its chunk table is refused before
// anything is allocated for that.
func TestHostileTables(t *testing.T) {
	entries, _ := bootstrap(t, "zstd")
	good, err := ParseEntry(entries[0])
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Entry){
		"compressed to nothing":     func(e *Entry) { e.ChunkCount, e.MetaLen, e.MetaCLen, e.MetaCodec = 1<<24, 1<<24*16, 1, CodecZstd },
		"more chunks than possible": func(e *Entry) { e.ChunkCount = 1<<32 - 1 },
		"longer than all tables":    func(e *Entry) { e.MetaLen, e.MetaCLen = 1<<62, 1<<62 },
		"longer than its chunks":    func(e *Entry) { e.MetaLen, e.MetaCLen = 1<<30, 1<<30 },
		"negative":                  func(e *Entry) { e.MetaLen, e.MetaCLen = -1, -1 },
		"behind the end":            func(e *Entry) { e.MetaOff = math.MaxInt64 },
		"TOC of everything":         func(e *Entry) { e.MetaLen, e.TOCSize = 0, 1<<32-1 },
		"blob of everything":        func(e *Entry) { e.Size = math.MaxInt64 &^ 4095 },
	} {
		t.Run(name, func(t *testing.T) {
			e := good
			change(&e)
			for _, size := range []huge{0, 1 << 20, math.MaxInt64} {
				allocated(t, maxBomb, func() { _, err = ReadTable(t.Context(), size, e) })
				if err == nil {
					t.Errorf("a table of an object of %d", size)
				}
			}
		})
	}
}
