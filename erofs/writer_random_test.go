package erofs

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// randomTree makes a tree of up to n nodes from a seed.
func randomTree(seed uint64, n int) *model {
	r := rand.New(rand.NewPCG(seed, 0))
	m := newModel(4096 << r.IntN(3))
	m.o.SharedXattrs = r.IntN(3) == 0
	m.o.Codec, m.o.Digester = r.Uint32N(4), r.Uint32N(2)
	for range 1 + r.IntN(4) {
		m.chunk(m.blob(), noise(r, 1+r.IntN(int(m.o.ChunkSize))))
	}
	dirs, leaves := []*Node{m.root}, []*Node{}
	for range r.IntN(n + 1) {
		parent := dirs[r.IntN(len(dirs))]
		name := randomName(r)
		if parent.Children[name] != nil {
			continue
		}
		if len(leaves) > 0 && r.IntN(8) == 0 {
			parent.Children[name] = leaves[r.IntN(len(leaves))]
			continue
		}
		c := m.randomNode(r)
		if c.Mode&typeMask == typeDir {
			dirs = append(dirs, c)
		} else {
			leaves = append(leaves, c)
		}
		parent.Children[name] = c
	}
	return m
}

func randomName(r *rand.Rand) string {
	l := 1 + r.IntN(12)
	if r.IntN(6) == 0 {
		l = 1 + r.IntN(maxNameLen)
	}
	p := noise(r, l)
	for i := range p {
		if p[i] == 0 || p[i] == '/' || p[i] == '.' {
			p[i] = 'n'
		}
	}
	return string(p)
}

func (m *model) randomNode(r *rand.Rand) *Node {
	kinds := []uint32{typeReg, typeReg, typeReg, typeDir, typeDir, typeLnk, typeChr, typeBlk, typeFifo, typeSock}
	n := &Node{
		Mode: kinds[r.IntN(len(kinds))] | r.Uint32N(0o10000), UID: r.Uint32(), GID: r.Uint32(),
		Sec: int64(r.Uint32()), Nsec: r.Uint32N(1e9),
	}
	switch n.Mode & typeMask {
	case typeReg:
		m.randomChunks(r, n)
	case typeDir:
		n.Children = map[string]*Node{}
	case typeLnk:
		n.Mode = typeLnk | 0o777
		n.Target = strings.Repeat("t", 1+r.IntN(1+r.IntN(maxTargetLen)))
	case typeChr, typeBlk:
		n.Major, n.Minor = r.Uint32N(1<<12), r.Uint32N(1<<20)
	}
	for i := range r.IntN(4) * r.IntN(2) {
		prefix := []string{"trusted.", "security.x"}[r.IntN(2)]
		l := r.IntN(20)
		if r.IntN(10) == 0 {
			l = r.IntN(5000)
		}
		n.Xattrs = append(n.Xattrs, Xattr{fmt.Sprintf("%s%d", prefix, i*1000+r.IntN(9)), bytes.Repeat([]byte{'v'}, l)})
	}
	return n
}

// randomChunks gives n a new run of chunks, or full ones seen before in any order.
func (m *model) randomChunks(r *rand.Rand, n *Node) {
	size := int(m.o.ChunkSize)
	blob := r.Uint32N(uint32(len(m.o.Blobs)))
	if r.IntN(3) > 0 {
		*n = Node{Mode: n.Mode, UID: n.UID, GID: n.GID, Sec: n.Sec, Nsec: n.Nsec}
		f := m.file(blob, noise(r, r.IntN(1+r.IntN(4*size))))
		n.Size, n.Chunks = f.Size, f.Chunks
		return
	}
	for range r.IntN(5) {
		b := r.Uint32N(uint32(len(m.o.Blobs)))
		c := r.Uint32N(uint32(len(m.o.Blobs[b].Chunks)))
		if m.o.Blobs[b].Chunks[c].Len == int64(size) {
			n.Chunks = append(n.Chunks, ChunkRef{b, c})
			n.Size += int64(size)
		}
	}
}

func TestWriteRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for i := range uint64(40) {
		t.Run(fmt.Sprintf("seed=%d", seed+i), func(t *testing.T) {
			m := randomTree(seed+i, 200)
			img := m.write(t)
			m.checkGoErofs(t, img)
			if !bytes.Equal(img, m.write(t)) {
				t.Error("a second run gives other bytes")
			}
			if i < 10 {
				m.checkKernel(t, img)
			}
		})
	}
}

func FuzzWrite(f *testing.F) {
	for seed := range uint64(4) {
		f.Add(seed, uint16(seed*50))
	}
	f.Fuzz(func(t *testing.T, seed uint64, n uint16) {
		m := randomTree(seed, int(n%500))
		m.checkGoErofs(t, m.write(t))
	})
}

// flatTree has n files of one chunk in directories of 100.
func flatTree(n int) *model {
	m := newModel(256 << 10)
	k := m.blob()
	b := &m.o.Blobs[k]
	var d *Node
	for i := range n {
		if i%100 == 0 {
			d = dir(0o755)
			m.root.Children[fmt.Sprintf("directory-%d", i/100)] = d
		}
		b.Chunks = append(b.Chunks, ChunkInfo{Blob: k, Index: uint32(i), Off: int64(i) * blockSize, Len: 4000, CLen: 4000, COff: int64(i) * 4000})
		d.Children[fmt.Sprintf("file-%d", i)] = &Node{Mode: typeReg | 0o644, Size: 4000, Chunks: []ChunkRef{{k, uint32(i)}}}
	}
	b.Size = int64(n) * blockSize
	m.finish()
	return m
}

// TestWriteCompact holds the metadata area to what its parts need.
func TestWriteCompact(t *testing.T) {
	const n = 13_000
	m := flatTree(n)
	img := m.write(t)
	need := n*(96+direntSize+len("file-12345")) + n*chunkInfoSize
	if len(img) > need*105/100+8*blockSize {
		t.Errorf("%d bytes for %d files: more than 5%% over the %d needed", len(img), n, need)
	}
}

func BenchmarkWrite(b *testing.B) {
	for _, n := range []int{13_000, 1_000_000} {
		m := flatTree(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := Write(io.Discard, m.root, m.o); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
