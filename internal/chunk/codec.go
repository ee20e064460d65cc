package chunk

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// A Codec is a compression, with the number that it has in the blob table.
type Codec uint32

// The codecs (rafs-v6-format 3.4).
const (
	CodecNone Codec = 0
	CodecLZ4  Codec = 1 // raw LZ4 block
	CodecGzip Codec = 2 // gzip member
	CodecZstd Codec = 3 // zstd frame
)

// String returns the name that nydus tools use.
func (c Codec) String() string {
	switch c {
	case CodecNone:
		return "none"
	case CodecLZ4:
		return "lz4_block"
	case CodecGzip:
		return "gzip"
	case CodecZstd:
		return "zstd"
	}
	return fmt.Sprintf("codec(%d)", uint32(c))
}

// A Decoder decodes units. It keeps the state of its codecs between calls and
// starts no goroutine; one goroutine at a time may use it.
type Decoder struct {
	zstd *zstd.Decoder
	gzip gzip.Reader
	src  bytes.Reader // what gzip reads
	more [1]byte      // what gzip must not have
}

// NewDecoder returns a Decoder. The caller closes it.
func NewDecoder() *Decoder { return &Decoder{} }

// Close frees what the decoder holds. It must not be used after that.
func (d *Decoder) Close() {
	if d.zstd != nil {
		d.zstd.Close()
	}
}

// slack is how many bytes behind its result Decode may use.
const slack = 64

// Decode decodes unit u of t from src, Unit.CLen bytes, into dst, Unit.Len bytes,
// as the cache file is to hold them: every chunk with a known digest is verified,
// padding and chunks without one are zero. Up to 64 bytes behind dst, where its
// capacity allows, are overwritten: units that lie together are decoded in
// ascending order. The error is a *CorruptError when src is
// not that unit; then dst is worthless.
func (d *Decoder) Decode(t *Table, u int, dst, src []byte) error {
	x := t.Unit(u)
	if int64(len(dst)) != x.Len || int64(len(src)) != x.CLen {
		return fmt.Errorf("chunk: internal error: unit %d needs buffers of %d and %d bytes, has %d and %d", u, x.Len, x.CLen, len(dst), len(src))
	}
	if !t.Needed(u) {
		clear(dst)
		return nil
	}
	// A batch is decoded to the end of dst: from there chunks move forward to
	// their pages, in order, without overwriting what has yet to move.
	p := t.chunks[x.First]
	plain := dst[:p.len()]
	if p.batched() {
		plain = dst[x.Len-int64(t.batches[p.high()].plain):]
	}
	codec := t.entry.Codec
	if _, compressed := t.stored(p); !compressed {
		codec = CodecNone
	}
	if err := d.decompress(codec, plain, src); err != nil {
		return &CorruptError{Chunk: x.First, Err: err}
	}
	for i := x.First; i < x.Last; i++ {
		p := t.chunks[i]
		at, n := p.off()-x.Off, p.len()
		copy(dst[at:at+n], plain[:n]) // of a single chunk: nothing to move
		plain = plain[n:]
		if !t.known(i) {
			n = 0
		} else if err := t.check(i, dst[at:at+n]); err != nil {
			return err
		}
		clear(dst[at+n : p.end()-x.Off])
	}
	return nil
}

// decompress fills dst from src, and fails when that is not what src holds.
func (d *Decoder) decompress(c Codec, dst, src []byte) (err error) {
	n := 0
	switch c {
	case CodecNone:
		if n = len(src); n == len(dst) {
			copy(dst, src)
		}
	case CodecLZ4:
		n, err = lz4.UncompressBlock(src, dst)
	case CodecGzip:
		n, err = d.gunzip(dst, src)
	case CodecZstd:
		n, err = d.unzstd(dst, src)
	default:
		err = errors.ErrUnsupported
	}
	if err != nil {
		return fmt.Errorf("decode %v: %w", c, err)
	}
	if n != len(dst) {
		return fmt.Errorf("decode %v: %w", c, lengthError(n, int64(len(dst))))
	}
	return nil
}

func (d *Decoder) gunzip(dst, src []byte) (int, error) {
	d.src.Reset(src)
	defer d.src.Reset(nil)
	if err := d.gzip.Reset(&d.src); err != nil {
		return 0, err
	}
	n, err := io.ReadFull(&d.gzip, dst)
	if err != nil {
		return n, err
	}
	// The end of the member, where its checksum is, or more than there may be.
	more, err := io.ReadFull(&d.gzip, d.more[:])
	if err == io.EOF {
		err = nil
	}
	return n + more, err
}

func (d *Decoder) unzstd(dst, src []byte) (int, error) {
	if d.zstd == nil {
		z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return 0, err
		}
		d.zstd = z
	}
	// The limit keeps the result inside dst's array, so it is never another one.
	// With some bytes to spare the decoder copies in whole words, which makes it
	// a third faster.
	out, err := d.zstd.DecodeAll(src, dst[:0:min(cap(dst), len(dst)+slack)])
	return len(out), err
}

// minSaving is how many bytes compression must save: decoding a frame costs 2 to 4 µs
// before its first byte, for as long as the image lives.
const minSaving = 256

// An Encoder compresses chunks. One goroutine at a time may use it. Equal bytes
// come out equal, whatever it encoded before.
type Encoder struct {
	codec Codec
	zstd  *zstd.Encoder
	lz4   lz4.Compressor
}

// NewEncoder returns an Encoder for CodecNone, CodecLZ4 or CodecZstd; the others
// are errors.ErrUnsupported. level is on zstd's scale from 1 to 22, of which four
// steps are different: 1 and 2 are fast; 0 means the default, which is 6. The caller
// closes it.
func NewEncoder(c Codec, level int) (*Encoder, error) {
	e := &Encoder{codec: c}
	switch c {
	case CodecNone, CodecLZ4:
		return e, nil
	case CodecZstd:
		l := zstd.SpeedBetterCompression // and what it makes decodes faster
		if level != 0 {
			l = zstd.EncoderLevelFromZstd(level)
		}
		var err error
		e.zstd, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(l), zstd.WithEncoderConcurrency(1),
			zstd.WithEncoderCRC(false), zstd.WithSingleSegment(true))
		return e, err
	default:
		return nil, unsupportedf("encode %v", c)
	}
}

// Close frees what the encoder holds. It must not be used after that.
func (e *Encoder) Close() {
	if e.zstd != nil {
		e.zstd.Close()
	}
}

// Encode compresses p into the array of dst, or a new one when that is too small.
// When the result would not be smaller than p by minSaving, out is p itself and
// compressed false: tables without flags know compressed chunks by their size
// (rafs-v6-format 3.3).
func (e *Encoder) Encode(dst, p []byte) (out []byte, compressed bool) {
	switch e.codec {
	case CodecLZ4:
		bound := lz4.CompressBlockBound(len(p))
		if cap(dst) < bound {
			dst = make([]byte, bound)
		}
		// With room for the worst case there is no error, and no other
		// result than the real one.
		n, err := e.lz4.CompressBlock(p, dst[:bound])
		if err != nil || n == 0 {
			return p, false
		}
		out = dst[:n]
	case CodecZstd:
		out = e.zstd.EncodeAll(p, dst[:0])
	default:
		return p, false
	}
	if len(out)+minSaving > len(p) {
		return p, false
	}
	return out, true
}
