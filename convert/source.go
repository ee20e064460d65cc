package convert

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/erofsd/erofsd/erofs"
)

// readBuffer is how much of a tar is read at once.
const readBuffer = 1 << 20

// A source is what is converted: layers, lowest first.
type source struct {
	layers []layerSource
	config json.RawMessage // of an OCI layout: the image's configuration
}

// A layerSource is one layer before it is read.
type layerSource struct {
	name string
	size int64 // bytes to be read, 0 when nobody knows before
	// read lays the layer over the tree lower and returns the result, which may
	// be lower itself. File contents go to s; passed hears how far it is.
	read func(ctx context.Context, lower *erofs.Node, s sink, b *budget, passed func(int64)) (*erofs.Node, error)
}

// openSource finds out what src is: by what it contains, never by its name.
func openSource(src string) (*source, error) {
	st, err := os.Stat(src)
	if err != nil {
		return nil, err
	}
	if st.Mode().IsRegular() {
		if st.Size() == 0 {
			return nil, fmt.Errorf("%s is empty: a tar file has at least one block", src)
		}
		return &source{layers: []layerSource{tarSource(src, filepath.Base(src), st.Size(), "")}}, nil
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("%s is neither a directory nor a tar file", src)
	}
	if _, err := os.Stat(filepath.Join(src, "oci-layout")); err == nil {
		return openLayout(src)
	}
	read := func(ctx context.Context, _ *erofs.Node, s sink, b *budget, passed func(int64)) (*erofs.Node, error) {
		return readDir(ctx, src, s, b, passed)
	}
	return &source{layers: []layerSource{{name: filepath.Base(filepath.Clean(src)), read: read}}}, nil
}

// tarSource is the tar file at file, compressed or not. When want is not empty
// the stored bytes must have this digest.
func tarSource(file, name string, size int64, want digest.Digest) layerSource {
	read := func(ctx context.Context, lower *erofs.Node, s sink, b *budget, passed func(int64)) (*erofs.Node, error) {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		var raw io.Reader = &passReader{&ctxReader{ctx, f}, passed}
		var check digest.Verifier
		if want != "" {
			check = want.Verifier()
			raw = io.TeeReader(raw, check)
		}
		l := newLayer(lower, b)
		if err := readCompressedTar(ctx, raw, l, s); err != nil {
			return nil, err
		}
		if check != nil {
			if _, err := io.Copy(io.Discard, raw); err != nil {
				return nil, err
			}
			if !check.Verified() {
				return nil, fmt.Errorf("content of %s is not %s: fetch the image again", file, want)
			}
		}
		return l.merge()
	}
	return layerSource{name: name, size: size, read: read}
}

// readCompressedTar reads raw to its end, so that the checksums behind a
// compressed tar count.
func readCompressedTar(ctx context.Context, raw io.Reader, l *layer, s sink) error {
	r, err := decompress(bufio.NewReaderSize(raw, readBuffer))
	if err != nil {
		return err
	}
	defer r.Close()
	if err := readTar(ctx, r, l, s); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("read behind the tar: %w", err)
	}
	return nil
}

// decompress looks at the first bytes of r.
func decompress(r *bufio.Reader) (io.ReadCloser, error) {
	head, err := r.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	starts := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	switch {
	case starts("\x1f\x8b"):
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, fmt.Errorf("read gzip: %w", err)
		}
		b := bufio.NewReaderSize(z, readBuffer)
		return struct {
			io.Reader
			io.Closer
		}{b, z}, nil
	case starts("\x28\xb5\x2f\xfd"):
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderConcurrency(2))
		if err != nil {
			return nil, fmt.Errorf("read zstd: %w", err)
		}
		return z.IOReadCloser(), nil
	case starts("\xfd7zXZ\x00"), starts("BZh"):
		return nil, errors.New("compressed with xz or bzip2: tar, tar.gz and tar.zst can be read")
	}
	return io.NopCloser(r), nil
}

// A passReader tells how many bytes went by.
type passReader struct {
	r      io.Reader
	passed func(int64)
}

func (p *passReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.passed(int64(n))
	return n, err
}

// A ctxReader ends when its context does; it lives no longer than one call.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}
