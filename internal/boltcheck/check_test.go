package boltcheck_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/erofsd/erofsd/internal/boltcheck"
)

const pageSize = 1024

// store is a file of bbolt with a tree of three levels, an inline bucket, a bucket with
// pages, a value of several pages, and free pages.
func store(t testing.TB) []byte {
	t.Helper()
	name := filepath.Join(t.TempDir(), "store")
	db, err := bolt.Open(name, 0o600, &bolt.Options{PageSize: pageSize, NoSync: true, NoFreelistSync: false})
	if err != nil {
		t.Fatal(err)
	}
	fill := func(tx *bolt.Tx) error {
		top, err := tx.CreateBucketIfNotExists([]byte("top"))
		if err != nil {
			return err
		}
		many, err1 := top.CreateBucketIfNotExists([]byte("many"))
		few, err2 := top.CreateBucketIfNotExists([]byte("few"))
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		for i := range 60 {
			key := fmt.Sprintf("%080d", i)
			err = errors.Join(err, many.Put([]byte(key), bytes.Repeat([]byte{'x'}, 150)))
		}
		return errors.Join(err, few.Put([]byte("a"), []byte("b")), top.Put([]byte("long"), make([]byte, 3*pageSize)))
	}
	remove := func(tx *bolt.Tx) error {
		many := tx.Bucket([]byte("top")).Bucket([]byte("many"))
		for i := 10; i < 30; i++ {
			if err := many.Delete(fmt.Appendf(nil, "%080d", i)); err != nil {
				return err
			}
		}
		return nil
	}
	if err := errors.Join(db.Update(fill), db.Update(remove), db.Close()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// page is the first page with a flag that some function takes.
func page(t testing.TB, b []byte, flag uint16, want func(p []byte) bool) []byte {
	t.Helper()
	for at := 2 * pageSize; at < len(b); at += pageSize {
		if p := b[at:][:pageSize]; native.Uint16(p[8:]) == flag && native.Uint64(p) == uint64(at/pageSize) && want(p) {
			return p
		}
	}
	t.Fatalf("no page of kind %d", flag)
	return nil
}

// free is the list of free pages that is in use.
func free(b []byte) []byte {
	state := b[16:]
	if other := b[pageSize+16:]; native.Uint64(other[48:]) > native.Uint64(state[48:]) {
		state = other
	}
	return b[native.Uint64(state[32:])*pageSize:][:pageSize]
}

var native = binary.NativeEndian

func notEmpty(p []byte) bool { return native.Uint16(p[10:]) > 0 }

// changeMeta changes both states, and makes their sums right.
func changeMeta(b []byte, change func(meta []byte)) {
	for i := range 2 {
		meta := b[i*pageSize+16:][:64]
		change(meta)
		sum := fnv.New64a()
		sum.Write(meta[:56])
		native.PutUint64(meta[56:], sum.Sum64())
	}
}

// TestCheck has one thing wrong at a time.
func TestCheck(t *testing.T) {
	whole := store(t)
	for _, test := range []struct {
		name   string
		change func(b []byte) []byte
		want   string
	}{
		{"whole", func(b []byte) []byte { return b }, ""},
		{"first state", func(b []byte) []byte { b[16+40]++; return b }, ""},
		{"second state", func(b []byte) []byte { b[pageSize+16+40]++; return b }, ""},
		{"kinds of the first pages", func(b []byte) []byte { b[8], b[pageSize+8] = 0, 0; return b }, ""},
		{"states with pages of two sizes", func(b []byte) []byte {
			size := uint32(pageSize)
			changeMeta(b, func(m []byte) { native.PutUint32(m[8:], size); size *= 2 })
			return b
		}, "1024 and of 2048"},
		{"second state elsewhere", func(b []byte) []byte {
			changeMeta(b, func(m []byte) { native.PutUint32(m[8:], 2*pageSize) })
			b[16+40]++
			return b
		}, "second page"},
		{"both states", func(b []byte) []byte { b[16+40]++; b[pageSize+16+40]++; return b }, "first pages"},
		{"empty", func(b []byte) []byte { return nil }, "first pages"},
		{"cut", func(b []byte) []byte { return b[:5*pageSize] }, "ends before"},
		{"size of pages", func(b []byte) []byte {
			changeMeta(b, func(m []byte) { native.PutUint32(m[8:], 0) })
			return b
		}, "pages of 0"},
		{"other size of pages", func(b []byte) []byte {
			changeMeta(b, func(m []byte) { native.PutUint32(m[8:], 2*pageSize) })
			return b
		}, "page"},
		{"more pages than there can be", func(b []byte) []byte {
			changeMeta(b, func(m []byte) { native.PutUint64(m[40:], 1<<63) })
			return b
		}, "ends before"},
		{"root outside", func(b []byte) []byte {
			changeMeta(b, func(m []byte) { native.PutUint64(m[16:], 1<<40) })
			return b
		}, "none of the file's"},
		{"root of another kind", func(b []byte) []byte {
			changeMeta(b, func(m []byte) { copy(m[16:24], m[32:40]) })
			return b
		}, "neither"},
		{"a page with another number", func(b []byte) []byte {
			native.PutUint64(page(t, b, 1, notEmpty), 3)
			return b
		}, "says that it is page"},
		{"a branch below itself", func(b []byte) []byte {
			p := page(t, b, 1, notEmpty)
			copy(p[16+8:][:8], p[:8])
			return b
		}, "two places"},
		{"a page below two", func(b []byte) []byte {
			p := page(t, b, 1, notEmpty)
			copy(p[32+8:][:8], p[16+8:][:8])
			return b
		}, "two places"},
		{"a branch without anything", func(b []byte) []byte {
			native.PutUint16(page(t, b, 1, notEmpty)[10:], 0)
			return b
		}, "is empty"},
		{"a key outside of a branch", func(b []byte) []byte {
			native.PutUint32(page(t, b, 1, notEmpty)[16:], 1<<30)
			return b
		}, "not in the page"},
		{"a key outside of a leaf", func(b []byte) []byte {
			native.PutUint32(page(t, b, 2, notEmpty)[16+4:], ^uint32(0))
			return b
		}, "not in the page"},
		{"a value outside", func(b []byte) []byte {
			native.PutUint32(page(t, b, 2, notEmpty)[16+12:], ^uint32(0))
			return b
		}, "not in the page"},
		{"an element of another kind", func(b []byte) []byte {
			page(t, b, 2, notEmpty)[16] |= 2
			return b
		}, "flags"},
		{"a value as a bucket", func(b []byte) []byte {
			page(t, b, 2, func(p []byte) bool { return bytes.Contains(p, []byte("xxx")) })[16] |= bucket
			return b
		}, "bucket"},
		{"an empty key", func(b []byte) []byte {
			native.PutUint32(page(t, b, 2, notEmpty)[16+8:], 0)
			return b
		}, "not in its place"},
		{"keys out of order", func(b []byte) []byte {
			p := page(t, b, 2, func(p []byte) bool { return native.Uint16(p[10:]) > 1 })
			native.PutUint32(p[32+4:], native.Uint32(p[16+4:])-16)
			return b
		}, "not in its place"},
		{"a key that belongs elsewhere", func(b []byte) []byte {
			p := page(t, b, 2, func(p []byte) bool { return bytes.Contains(p, []byte("00")) })
			at := bytes.Index(p, []byte("00"))
			p[at] = '9'
			return b
		}, "not in its place"},
		{"more elements than there can be", func(b []byte) []byte {
			native.PutUint16(page(t, b, 2, notEmpty)[10:], 0xFFFF)
			return b
		}, "elements"},
		{"a page as long as no file", func(b []byte) []byte {
			native.PutUint32(page(t, b, 2, notEmpty)[12:], ^uint32(0))
			return b
		}, "more"},
		{"a free page that is in use", func(b []byte) []byte {
			copy(free(b)[16:24], page(t, b, 2, func(p []byte) bool { return bytes.Contains(p, []byte("xxx")) })[:8])
			return b
		}, "free"},
		{"a free page twice", func(b []byte) []byte {
			p := free(b)
			copy(p[24:32], p[16:24])
			return b
		}, "free"},
		{"more free pages than there can be", func(b []byte) []byte {
			native.PutUint16(free(b)[10:], 0xFFFF) // the first of them is how many there are then
			native.PutUint64(free(b)[16:], 1<<61)
			return b
		}, "free"},
		{"free pages of another kind", func(b []byte) []byte {
			free(b)[8] = 2
			return b
		}, "free"},
		{"no list of free pages", func(b []byte) []byte {
			changeMeta(b, func(m []byte) { native.PutUint64(m[32:], ^uint64(0)) })
			return b
		}, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := test.change(bytes.Clone(whole))
			err := boltcheck.Check(bytes.NewReader(b), int64(len(b)))
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
}

const bucket = 1

// TestHealthy has no store refused that bbolt made: buckets, and keys of any size, come and go.
func TestHealthy(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	name := filepath.Join(t.TempDir(), "store")
	for round := range 300 {
		db, err := bolt.Open(name, 0o600, &bolt.Options{PageSize: pageSize, NoSync: true, NoFreelistSync: round%7 == 0})
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(db.Update(func(tx *bolt.Tx) error { return churn(tx, r) }), db.Close()); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := boltcheck.Check(bytes.NewReader(b), int64(len(b))); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
}

// churn puts and removes keys, more of the one or of the other, in some buckets.
func churn(tx *bolt.Tx, r *rand.Rand) error {
	remove := r.IntN(10)
	for range 1 + r.IntN(200) {
		top, err := tx.CreateBucketIfNotExists(fmt.Appendf(nil, "top%d", r.IntN(3)))
		if err != nil {
			return err
		}
		name := fmt.Appendf(nil, "bucket%d", r.IntN(40))
		if r.IntN(300) == 0 && top.Bucket(name) != nil {
			err = top.DeleteBucket(name)
		}
		b, berr := top.CreateBucketIfNotExists(name)
		if err := errors.Join(err, berr); err != nil {
			return err
		}
		key := fmt.Appendf(nil, "%0*d", 1+r.IntN(60), r.IntN(200))
		if r.IntN(10) < remove {
			key, _ = b.Cursor().Seek(key)
			err = b.Delete(key)
		} else {
			err = b.Put(key, make([]byte, r.IntN(1+r.IntN(3*pageSize))))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// FuzzCheck has bbolt read and write all of what passes: nothing of it may panic or fault.
func FuzzCheck(f *testing.F) {
	whole := store(f)
	f.Add(uint16(0), byte(0), uint16(0), byte(0), uint16(0), byte(0))
	f.Add(uint16(2*pageSize+24), byte(1), uint16(0), byte(0), uint16(0), byte(0))
	f.Add(uint16(5*pageSize+16), byte(255), uint16(5*pageSize+20), byte(255), uint16(0), byte(0))
	name := filepath.Join(f.TempDir(), "store")
	f.Fuzz(func(t *testing.T, at1 uint16, x1 byte, at2 uint16, x2 byte, at3 uint16, x3 byte) {
		b := bytes.Clone(whole)
		b[int(at1)%len(b)] ^= x1
		b[int(at2)%len(b)] ^= x2
		b[int(at3)%len(b)] ^= x3
		changeMeta(b, func([]byte) {})              // the sums are right
		for _, header := range []int{0, pageSize} { // at which bbolt's own check alone looks
			copy(b[header:][:16], whole[header:])
		}
		if boltcheck.Check(bytes.NewReader(b), int64(len(b))) != nil {
			return
		}
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bolt.Open(name, 0o600, &bolt.Options{NoSync: true})
		if err != nil {
			t.Fatal(err)
		}
		defer db.Close()
		if err := db.Update(rewrite); err != nil {
			t.Error(err)
		}
		err = db.View(func(tx *bolt.Tx) error {
			for err := range tx.Check() {
				if !strings.HasSuffix(err.Error(), "unreachable unfreed") { // room that is lost, and nothing else
					t.Error(err)
				}
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	})
}

// rewrite writes everything that there is again, and some more.
func rewrite(tx *bolt.Tx) error {
	return tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
		if b == nil { // the root of something else
			return nil
		}
		return again(b)
	})
}

func again(b *bolt.Bucket) error {
	type pair struct{ key, value []byte }
	var pairs []pair
	err := b.ForEach(func(k, v []byte) error {
		if v == nil {
			return again(b.Bucket(k))
		}
		pairs = append(pairs, pair{bytes.Clone(k), bytes.Clone(v)})
		return nil
	})
	for _, p := range pairs {
		if got := b.Get(p.key); !bytes.Equal(got, p.value) {
			return fmt.Errorf("key %q has %q, not %q", p.key, got, p.value)
		}
		err = errors.Join(err, b.Delete(p.key), b.Put(append(p.key, 'x'), p.value))
	}
	return err
}
