package convert

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/chunk"
)

const (
	minChunk      = 4 << 10 // rafs-v6-format 9.1, as the next two
	maxChunk      = 16 << 20
	maxBlobChunks = 1<<24 - 1
	defaultChunk  = 256 << 10
	jobMemory     = 32 << 20 // plain bytes that are between reader and blob
	maxJobs       = 256
	writeSize     = 1 << 20 // bytes of one write into a blob
)

// A packer turns file contents into blobs, one blob a layer. A chunk that any
// blob of the image has is not stored again.
//
//	reader -> jobs -> workers (digest, look up, compress)
//	   `----> order ----------> collector -> blobWriter (write, SHA-256)
//
// The collector takes the chunks in the order in which they were read, so the
// blobs do not depend on the workers. All buffers belong to a fixed number of
// jobs, which is what bounds memory.
type packer struct {
	chunkSize int64
	codec     chunk.Codec
	digester  chunk.Digester
	encoders  []*chunk.Encoder // one a worker
	budget    *budget
	in        int64 // plain bytes taken; the reader's

	// mu guards seen.
	mu   sync.Mutex
	seen map[chunkKey]*content
}

type chunkKey struct {
	digest chunk.Digest
	size   int64
}

// A content is a chunk as it is stored once.
type content struct {
	ready  chan struct{} // closed when job has compressed it; nil once stored
	job    *job          // which compresses it; nil once stored
	ref    erofs.ChunkRef
	stored bool // ref is valid; the collector's
}

// A job carries one chunk of a file through the packer.
type job struct {
	node       *erofs.Node
	plain      []byte // the chunk
	buf        []byte // room for the compressed form
	out        []byte // the compressed form, or plain
	compressed bool
	key        chunkKey
	content    *content
	done       chan struct{} // gets one token when content is known
}

// newPacker returns a packer as o wants it. It must be closed.
func newPacker(o Options, b *budget) (*packer, error) {
	p := &packer{chunkSize: int64(o.ChunkSize), budget: b, seen: make(map[chunkKey]*content)}
	if p.chunkSize == 0 {
		p.chunkSize = defaultChunk
	}
	if p.chunkSize < minChunk || p.chunkSize > maxChunk || p.chunkSize&(p.chunkSize-1) != 0 {
		return nil, fmt.Errorf("chunk size %d: only powers of two from %d to %d are possible", p.chunkSize, minChunk, maxChunk)
	}
	var ok bool
	if p.codec, ok = codecs[o.Compressor]; !ok {
		return nil, fmt.Errorf("compressor %q: only zstd, lz4_block and none are possible", o.Compressor)
	}
	if p.digester, ok = digesters[o.Digester]; !ok {
		return nil, fmt.Errorf("digester %q: only blake3 and sha256 are possible", o.Digester)
	}
	for range runtime.GOMAXPROCS(0) {
		e, err := chunk.NewEncoder(p.codec, o.Level)
		if err != nil {
			p.close()
			return nil, err
		}
		p.encoders = append(p.encoders, e)
	}
	return p, nil
}

func (p *packer) close() {
	for _, e := range p.encoders {
		e.Close()
	}
}

// A packedBlob is a finished blob in its staging file.
type packedBlob struct {
	path   string
	size   int64
	entry  chunk.Entry // without Index
	chunks []chunk.Chunk
}

// layer runs read, whose sink stores file contents in a new blob at name. index
// is what ChunkRef.Blob is for it. durable says that the file is to be flushed
// to the disk. The blob is nil when the layer needed no new chunk.
func (p *packer) layer(ctx context.Context, name string, index uint32, durable bool, read func(context.Context, sink) error) (_ *packedBlob, err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := newBlobWriter(f, durable)
	chunks, err := p.run(ctx, index, w, read)
	if err != nil || len(chunks) == 0 {
		return nil, err
	}
	e, size, err := w.finish(chunk.Tail{
		Chunks: chunks, Codec: p.codec, Digester: p.digester, ChunkSize: uint32(p.chunkSize),
	})
	if err != nil {
		return nil, fmt.Errorf("write blob: %w", err)
	}
	return &packedBlob{path: name, size: size, entry: e, chunks: chunks}, nil
}

// run starts the goroutines of one layer and waits for them.
func (p *packer) run(ctx context.Context, index uint32, w *blobWriter, read func(context.Context, sink) error) ([]chunk.Chunk, error) {
	count := max(int(min(jobMemory/p.chunkSize, maxJobs)), 2*len(p.encoders)+2)
	s := &packSink{
		p:    p,
		free: make(chan *job, count), jobs: make(chan *job, count), order: make(chan *job, count),
	}
	for range count {
		s.free <- &job{done: make(chan struct{}, 1)}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(s.jobs)
		defer close(s.order)
		return read(ctx, s)
	})
	for _, e := range p.encoders {
		g.Go(func() error {
			for j := range s.jobs {
				p.work(e, j)
			}
			return nil
		})
	}
	g.Go(w.run)
	c := &collector{p: p, index: index, w: w}
	g.Go(func() error {
		defer close(w.full)
		for j := range s.order {
			if err := c.collect(ctx, j); err != nil {
				return err
			}
			s.free <- j // has room for all jobs
		}
		return w.flush(ctx)
	})
	err := g.Wait()
	return c.chunks, err
}

// work finds out what content j carries and, when nobody else does, compresses
// it. Whoever compresses, the bytes are the same.
func (p *packer) work(e *chunk.Encoder, j *job) {
	j.key = chunkKey{p.digester.Sum(j.plain), int64(len(j.plain))}
	var ready chan struct{} // not nil: this job compresses
	p.mu.Lock()
	c := p.seen[j.key]
	if c == nil {
		ready = make(chan struct{})
		c = &content{ready: ready, job: j}
		p.seen[j.key] = c
	}
	p.mu.Unlock()
	j.content = c
	j.done <- struct{}{}
	if ready != nil {
		j.out, j.compressed = e.Encode(j.buf[:0], j.plain)
		if j.compressed {
			j.buf = j.out
		}
		close(ready)
	}
}

// A packSink is what the reader of a layer writes to.
type packSink struct {
	p                 *packer
	free, jobs, order chan *job
}

func (s *packSink) file(ctx context.Context, n *erofs.Node, r io.Reader, size int64) error {
	if err := s.p.budget.file(size, s.p.chunkSize); err != nil {
		return err
	}
	for size > 0 {
		var j *job
		select {
		case j = <-s.free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		part := int(min(size, s.p.chunkSize))
		if cap(j.plain) < part {
			j.plain = make([]byte, part)
		}
		j.node, j.plain = n, j.plain[:part]
		if _, err := io.ReadFull(r, j.plain); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		size -= int64(part)
		s.p.in += int64(part)
		s.jobs <- j // both have room for all jobs
		s.order <- j
	}
	return nil
}

// A collector gives the chunks of a layer their places, in the order in which
// they were read.
type collector struct {
	p      *packer
	index  uint32
	w      *blobWriter
	chunks []chunk.Chunk
	off    int64 // in the cache file
	coff   int64 // in the blob
}

func (c *collector) collect(ctx context.Context, j *job) error {
	select {
	case <-j.done:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if !j.content.stored {
		if err := c.store(ctx, j.content); err != nil {
			return err
		}
	}
	j.node.Chunks = append(j.node.Chunks, j.content.ref)
	return nil
}

// store appends x to the blob. The job that compressed it may be one that was
// read later; it is still on its way to the collector, so its buffers are good.
func (c *collector) store(ctx context.Context, x *content) error {
	select {
	case <-x.ready:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if len(c.chunks) == maxBlobChunks {
		return fmt.Errorf("layer has more than %d chunks: choose a larger chunk size", maxBlobChunks)
	}
	if err := c.w.write(ctx, x.job.out); err != nil {
		return err
	}
	ch := chunk.Chunk{
		Off: c.off, Len: x.job.key.size, COff: c.coff, CLen: int64(len(x.job.out)),
		Compressed: x.job.compressed, Digest: x.job.key.digest, Known: true,
	}
	x.ref = erofs.ChunkRef{Blob: c.index, Chunk: uint32(len(c.chunks))}
	x.job, x.ready, x.stored = nil, nil, true
	c.chunks = append(c.chunks, ch)
	c.off += (ch.Len + 4095) &^ 4095
	c.coff += ch.CLen
	return nil
}
