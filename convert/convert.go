package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/erofsd/erofsd/erofs"
	"github.com/erofsd/erofsd/internal/chunk"
)

// Options say how to convert. The zero value works.
type Options struct {
	ChunkSize  uint32      // bytes, a power of two from 4 KiB to 16 MiB; 0: 256 KiB
	Compressor string      // "zstd", "lz4_block" or "none"; "": zstd
	Level      int         // of zstd, 1 to 22; 0: its default
	Digester   string      // "blake3" or "sha256"; "": blake3
	Progress   func(Event) // called often, never concurrently; nil: nobody
	TempDir    string      // holds the blobs until they are pushed; "": the system's

	limits *limits // for tests; nil: defaultLimits
}

// A Result is what was made.
type Result struct {
	Layers int           // of the source
	Files  int64         // names in the merged tree that are not directories
	Chunks int64         // stored in the blobs of the image
	Blobs  int           // that the image refers to
	In     int64         // plain bytes of the files of all layers
	Out    int64         // bytes of blobs and bootstrap, as stored
	Digest digest.Digest // of the manifest; registry only
}

// A Destination takes the objects of an image, for example a registry.
// [backend/registry.Pusher] is one.
type Destination interface {
	// Blob stores an object unless it is there. It may call open several times.
	// Its error says what was being stored where.
	Blob(ctx context.Context, d ocispec.Descriptor, open func() (io.ReadCloser, error)) error
	// Manifest makes the image visible. It is called last.
	Manifest(ctx context.Context, d ocispec.Descriptor, body []byte) error
}

// Convert converts src (a directory, a tar, tar.gz or tar.zst file, an OCI layout
// directory) and stores it in dest as a nydus image: data blobs, a bootstrap
// layer, configuration and manifest (rafs-v6-format 3.7). On an error no
// manifest was stored, and nothing is left in Options.TempDir.
func Convert(ctx context.Context, src string, dest Destination, o Options) (*Result, error) {
	stage, err := os.MkdirTemp(o.TempDir, "erofs-convert-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(stage)
	img, err := build(ctx, src, stage, false, o)
	if err != nil {
		return nil, fmt.Errorf("convert %s: %w", src, err)
	}
	r := &reporter{f: o.Progress}
	defer r.close()
	if err := img.push(ctx, dest, r); err != nil {
		return nil, fmt.Errorf("store image: %w", err)
	}
	return &img.result, nil
}

// An image is a converted image in its staging directory.
type image struct {
	stage     string
	blobs     []*packedBlob // that the tree refers to, lowest layer first
	layerHas  []bool        // for each layer of the source: one of blobs is its
	bootstrap string        // file
	config    json.RawMessage
	result    Result
}

// build reads src and leaves blobs and bootstrap in the directory stage. durable
// says that these files will stay, so that they are flushed to the disk.
func build(ctx context.Context, src, stage string, durable bool, o Options) (*image, error) {
	if err := apart(src, stage); err != nil {
		return nil, err
	}
	from, err := openSource(src)
	if err != nil {
		return nil, err
	}
	b := budget(defaultLimits)
	if o.limits != nil {
		b = budget(*o.limits)
	}
	p, err := newPacker(o, &b)
	if err != nil {
		return nil, err
	}
	defer p.close()
	rep := &reporter{f: o.Progress}
	defer rep.close()
	img := &image{stage: stage, config: from.config, result: Result{Layers: len(from.layers)}}
	root := emptyDir()
	var blobs []*packedBlob
	owner := make([]int, len(from.layers)) // index in blobs, or -1
	for i, l := range from.layers {
		m := rep.meter(Event{Stage: StageRead, Name: l.name, Layer: i + 1, Layers: len(from.layers), Total: l.size})
		read := func(ctx context.Context, s sink) (err error) {
			root, err = l.read(ctx, root, s, &b, m.add)
			if err != nil && len(from.layers) > 1 {
				err = fmt.Errorf("layer %d, %s: %w", i+1, l.name, err)
			}
			return err
		}
		blob, err := p.layer(ctx, filepath.Join(stage, strconv.Itoa(i)), uint32(len(blobs)), durable, read)
		if err != nil {
			return nil, err
		}
		owner[i] = -1
		if blob != nil {
			owner[i] = len(blobs)
			blobs = append(blobs, blob)
		}
		m.end()
	}
	img.result.In = p.in
	if err := img.writeBootstrap(root, blobs, p, durable); err != nil {
		return nil, err
	}
	img.take(root, blobs, owner)
	return img, nil
}

// take takes the blobs that the tree refers to. owner is the index in blobs of
// each layer of the source, or -1.
func (img *image) take(root *erofs.Node, blobs []*packedBlob, owner []int) {
	used := make([]bool, len(blobs))
	img.count(root, used)
	for i, b := range blobs {
		if used[i] {
			img.blobs = append(img.blobs, b)
			img.result.Chunks += int64(len(b.chunks))
			img.result.Out += b.size
		}
	}
	img.result.Blobs = len(img.blobs)
	for _, i := range owner {
		img.layerHas = append(img.layerHas, i >= 0 && used[i])
	}
}

// apart refuses to stage inside of what is read: the image would contain itself.
func apart(src, stage string) error {
	src, err := filepath.EvalSymlinks(src)
	if err != nil {
		return err
	}
	if src, err = filepath.Abs(src); err != nil {
		return err
	}
	if stage, err = filepath.EvalSymlinks(stage); err != nil {
		return err
	}
	if stage, err = filepath.Abs(stage); err != nil {
		return err
	}
	if rel, err := filepath.Rel(src, stage); err == nil && rel != ".." && !strings.HasPrefix(rel, "../") {
		return errors.New("the destination or the directory for temporary files lies inside the source: choose another")
	}
	return nil
}

// count counts the files below n and marks the blobs that they refer to.
func (img *image) count(n *erofs.Node, used []bool) {
	for _, c := range n.Children {
		if isDir(c) {
			img.count(c, used)
			continue
		}
		img.result.Files++
		for _, ref := range c.Chunks {
			used[ref.Blob] = true
		}
	}
}

// writeBootstrap writes the tree as image.boot into the staging directory. Blobs
// that no file refers to are not named there.
func (img *image) writeBootstrap(root *erofs.Node, blobs []*packedBlob, p *packer, durable bool) (err error) {
	img.bootstrap = filepath.Join(img.stage, bootstrapName)
	f, err := os.OpenFile(img.bootstrap, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	o := erofs.WriteOptions{ChunkSize: uint32(p.chunkSize), Codec: uint32(p.codec), Digester: uint32(p.digester)}
	for i, b := range blobs {
		o.Blobs = append(o.Blobs, b.metadata(uint32(i)))
	}
	if err := erofs.Write(f, root, o); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	img.result.Out += st.Size()
	if durable {
		return f.Sync()
	}
	return nil
}

// metadata is what the bootstrap says about b: all chunks of the blob, also
// those that no file needs any more.
func (b *packedBlob) metadata(index uint32) erofs.Blob {
	m := erofs.Blob{ID: b.entry.ID, Size: b.entry.Size, Entry: b.entry.Marshal()}
	m.Chunks = make([]erofs.ChunkInfo, len(b.chunks))
	for i, c := range b.chunks {
		m.Chunks[i] = erofs.ChunkInfo{
			Digest: c.Digest, Blob: index, Index: uint32(i), Compressed: c.Compressed,
			COff: c.COff, CLen: c.CLen, Off: c.Off, Len: c.Len,
		}
	}
	return m
}

// codecs and digesters are the words that Options take.
var (
	codecs    = map[string]chunk.Codec{"": chunk.CodecZstd, "zstd": chunk.CodecZstd, "lz4_block": chunk.CodecLZ4, "none": chunk.CodecNone}
	digesters = map[string]chunk.Digester{"": chunk.BLAKE3, "blake3": chunk.BLAKE3, "sha256": chunk.SHA256}
)
