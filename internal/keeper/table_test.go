package keeper

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func duplicate(t testing.TB, f *os.File) int {
	t.Helper()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

func waitFor(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// running reports whether a process runs: it may be dead and nobody has waited for it.
func running(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !bytes.Contains(text, []byte(") Z "))
}

// contents reads all of a table.
func contents(t *testing.T, table *table) (names []string, data map[string]string) {
	t.Helper()
	data = make(map[string]string)
	for _, i := range table.list() {
		p, err := table.data(i)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, i.name)
		data[i.name] = string(p)
	}
	return names, data
}

// again loads a copy of a table's log, cut to size bytes.
func again(t *testing.T, old *table, size int64) *table {
	t.Helper()
	log, err := memoryFile("copy")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(log, io.NewSectionReader(old.log, 0, size)); err != nil {
		t.Fatal(err)
	}
	loaded, lost, err := loadTable(nil, log, old.logID, nil)
	if err != nil || len(lost) > 0 {
		t.Fatalf("load: %v, lost %q", err, lost)
	}
	t.Cleanup(func() { loaded.close(false) })
	return loaded
}

// TestTable does random things and compares with a map, and what is loaded from the log
// with both.
func TestTable(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	table, err := newTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer table.close(false)
	var order []string
	want := make(map[string]string)
	logs := make(map[uint64]bool)
	for i := range 3000 {
		name := fmt.Sprint(rnd.IntN(40))
		if _, found := want[name]; rnd.IntN(3) == 0 {
			if err := table.drop(name); err != nil {
				t.Fatal(err)
			}
			delete(want, name)
			if found {
				order = slices.DeleteFunc(order, func(s string) bool { return s == name })
			}
		} else {
			data := strings.Repeat(fmt.Sprint(i), rnd.IntN(4000))
			if err := table.put(name, []byte(data), -1); err != nil {
				t.Fatal(err)
			}
			if !found {
				order = append(order, name)
			}
			want[name] = data
		}
		logs[table.logID] = true
		if i%100 != 0 {
			continue
		}
		bytes := 0
		for name, data := range want {
			bytes += len(name) + len(data)
		}
		for _, x := range []*struct{ *tableView }{{view(t, table)}, {view(t, again(t, table, table.size))}} {
			if !slices.Equal(x.names, order) || !maps.Equal(x.data, want) || x.bytes != bytes {
				t.Fatalf("after %d steps it has %q of %d bytes, want %q of %d", i, x.names, x.bytes, order, bytes)
			}
		}
	}
	if len(logs) < 2 {
		t.Errorf("only %d logs were written: nothing was compacted", len(logs))
	}
}

type tableView struct {
	names []string
	data  map[string]string
	bytes int
}

func view(t *testing.T, table *table) *tableView {
	names, data := contents(t, table)
	return &tableView{names, data, table.bytes}
}

// TestTableCut cuts the log off at every place: what was whole is there.
func TestTableCut(t *testing.T) {
	table, err := newTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer table.close(false)
	ends := []int64{0}
	for i := range 4 {
		if err := table.put(fmt.Sprint(i), []byte("data"), -1); err != nil {
			t.Fatal(err)
		}
		ends = append(ends, table.size)
	}
	for size := range table.size + 1 {
		whole := 0
		for whole+1 < len(ends) && ends[whole+1] <= size {
			whole++
		}
		loaded := again(t, table, size)
		if len(loaded.items) != whole {
			t.Fatalf("of %d bytes %d entries were read, want %d", size, len(loaded.items), whole)
		}
		if err := loaded.put("after", nil, -1); err != nil {
			t.Fatal(err)
		}
		if got := again(t, loaded, loaded.size); len(got.items) != whole+1 {
			t.Fatalf("after %d bytes and a put %d entries were read, want %d", size, len(got.items), whole+1)
		}
	}
}

func TestTableLimits(t *testing.T) {
	table, err := newTable(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer table.close(false)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	data := make([]byte, MaxData)
	n := 0
	for ; err == nil; n++ {
		err = table.put(fmt.Sprint(n), data, -1)
	}
	if !strings.Contains(err.Error(), "limit") || n < MaxBytes/(MaxData+10) {
		t.Errorf("put %d of %d bytes: %v", n, MaxData, err)
	}
	if err := table.put("0", data[1:], duplicate(t, null)); err != nil {
		t.Errorf("less in the place of more: %v", err)
	}
	if err := table.put("file", data, duplicate(t, null)); err == nil { // its descriptor is closed
		t.Error("too much with a file was taken")
	}
	for i := range n {
		if err := table.drop(fmt.Sprint(i)); err != nil {
			t.Fatal(err)
		}
	}
	if table.bytes != 0 || table.live != 0 || table.size > slack {
		t.Errorf("empty it counts %d bytes, %d live of %d", table.bytes, table.live, table.size)
	}
	for i := range MaxEntries {
		if err := table.put(fmt.Sprint(i), nil, -1); err != nil {
			t.Fatal(err)
		}
	}
	if err := table.put("x", nil, -1); err == nil || !strings.Contains(err.Error(), "limit") {
		t.Errorf("one more than %d: %v", MaxEntries, err)
	}
	if err := table.put("7", []byte("y"), -1); err != nil {
		t.Errorf("one in the place of another: %v", err)
	}
}

func FuzzTable(f *testing.F) {
	f.Add([]byte("\x01"), int64(0))
	f.Fuzz(func(t *testing.T, p []byte, at int64) {
		old, err := newTable(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer old.close(false)
		for _, name := range []string{"a", "b"} {
			if err := old.put(name, []byte("data of "+name), -1); err != nil {
				t.Fatal(err)
			}
		}
		if at = max(0, at); at > 1<<16 {
			at = old.size
		}
		if _, err := old.log.WriteAt(p, at); err != nil {
			t.Fatal(err)
		}
		info, err := old.log.Stat()
		if err != nil {
			t.Fatal(err)
		}
		contents(t, again(t, old, info.Size()))
	})
}
