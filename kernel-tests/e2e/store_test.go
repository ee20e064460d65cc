package e2e

import (
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/erofsd/erofsd/kernel-tests/services"
)

// bucket is the configuration of one, and whoever asks there.
func bucket(endpoint, secret string) object {
	return object{
		"scheme": "http", "endpoint": endpoint, "bucket_name": services.Bucket, "object_prefix": "some/prefix/",
		"access_key_id": services.KeyID, "access_key_secret": secret, "timeout": 5, "connect_timeout": 2, "retry_limit": 2,
	}
}

// stores reads from all that is no registry.
func (w *world) stores(t *testing.T) {
	for name, run := range map[string]func(t *testing.T){
		"s3": w.s3, "oss": w.oss, "http-proxy": w.httpProxy, "localfs": w.localFS, "localdisk": w.localDisk,
	} {
		t.Run(name, run)
	}
}

func (w *world) s3(t *testing.T) {
	p := services.S3(t, w.blobs, "some/prefix")
	keys := bucket(p.Addr, services.Secret)
	keys["region"] = services.Region
	m := w.start(t)
	point := m.mount(t, "s3", keys)
	m.mustRead(t, point, w.files("data/")[0])
	p.Kill()
	m.mustFail(t, point, w.files("data/")[20])
	p.Start(t)
	m.recovers(t, point, w.files("data/")[20])
	m.whole(t, point)

	keys["access_key_secret"] = "guessed"
	w.start(t).refused(t, "s3", keys, "403")
	keys["access_key_secret"], keys["object_prefix"] = services.Secret, "elsewhere/"
	w.start(t).refused(t, "s3", keys, "404")
}

func (w *world) oss(t *testing.T) {
	addr := services.OSS(t, w.blobs, "some/prefix/")
	m := w.start(t)
	m.whole(t, m.mount(t, "oss", bucket(addr, services.Secret)))
	w.start(t).refused(t, "oss", bucket(addr, "guessed"), "SignatureDoesNotMatch")
}

// httpProxy reads from a plain server of files: at an address, below a path, and at a unix
// socket.
func (w *world) httpProxy(t *testing.T) {
	files := http.FileServer(http.Dir(w.blobs))
	tcp := httptest.NewServer(http.StripPrefix("/below/this", files))
	t.Cleanup(tcp.Close)
	socket := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	unix := &httptest.Server{Listener: listener, Config: &http.Server{Handler: files}}
	unix.Start()
	t.Cleanup(unix.Close)
	for name, keys := range map[string]object{
		"address": {"addr": tcp.URL, "path": "below/this"}, "socket": {"addr": socket},
	} {
		t.Run(name, func(t *testing.T) {
			m := w.start(t)
			m.whole(t, m.mount2(t, "http-proxy", keys))
		})
	}
}

func (w *world) localFS(t *testing.T) {
	empty := t.TempDir()
	half := t.TempDir() // has something else
	if err := os.WriteFile(filepath.Join(half, "other"), []byte("something"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, keys := range map[string]object{
		"dir": {"dir": w.blobs}, "blob_file": {"blob_file": filepath.Join(w.blobs, w.id)},
		"alt_dirs": {"dir": empty, "alt_dirs": []string{half, w.blobs}},
	} {
		t.Run(name, func(t *testing.T) {
			m := w.start(t)
			m.whole(t, m.mount(t, "localfs", keys))
		})
	}
}

func (w *world) localDisk(t *testing.T) {
	device := services.Disk(t, w.blobs)
	for name, mount := range map[string]func(m *machine) string{
		"v1": func(m *machine) string { return m.mount(t, "localdisk", object{"device_path": device}) },
		"v2": func(m *machine) string { return m.mount2(t, "localdisk", object{"device_path": device}) },
	} {
		t.Run(name, func(t *testing.T) {
			m := w.start(t)
			m.whole(t, mount(m))
		})
	}
}
