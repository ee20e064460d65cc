package e2e

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/testenv"
	"github.com/erofsd/erofsd/kernel-tests/services"
)

// detection is how soon a dead proxy must have been noticed.
const detection = 15 * time.Second

// dragonflies runs nydus's smoke cases for Dragonfly by their names, in its four modes. With a
// scheduler's address nydusd asks peers itself; we accept it and reach peers through the
// proxy, so that cases of that library alone have nothing to test.
func (w *world) dragonflies(t *testing.T) {
	origin := w.seeded(t, services.RegistryOptions{Login: true})
	for name, mode := range map[string]object{
		"proxy-fallback": {"fallback": true},
		"proxy-strict":   {"fallback": false},
		"sdk-fallback":   {"fallback": true, "dragonfly_scheduler_endpoint": "http://127.0.0.1:1"},
		"sdk-strict":     {"fallback": false, "dragonfly_scheduler_endpoint": "http://127.0.0.1:1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w.dragonfly(t, origin, mode)
		})
	}
	t.Run("UseHTTP", w.useHTTP)
	t.Run("ErrorInjection", func(t *testing.T) { w.injection(t, origin) })
}

// behind mounts the image at a new machine behind a new proxy.
func (w *world) behind(t *testing.T, origin *services.Process, mode object) (*dfdaemon, *machine, string) {
	t.Helper()
	d, m := newDfdaemon(t), w.start(t)
	proxy := object{"url": "http://" + d.addr, "ping_url": "http://" + d.addr + "/healthy", "check_interval": 1}
	for k, v := range mode {
		proxy[k] = v
	}
	return d, m, m.mount(t, "registry", at(origin.Addr, "http", object{"auth": services.Auth(), "retry_limit": 2, "timeout": 2, "proxy": proxy}))
}

func (w *world) dragonfly(t *testing.T, origin *services.Process, mode object) {
	d, m, point := w.behind(t, origin, mode)
	data := w.files("data/")
	cold := func() string { // a file of which nobody has read anything
		name := data[0]
		data = data[1:]
		return name
	}
	t.Run("VerifyMount", func(t *testing.T) {
		var st unix.Statfs_t
		if err := unix.Statfs(point, &st); err != nil || st.Type != unix.EROFS_SUPER_MAGIC_V1 {
			t.Errorf("it is no EROFS: %x, %v", st.Type, err)
		}
		if target, err := os.Readlink(filepath.Join(point, "program")); err != nil || target != w.want["program"].Target {
			t.Errorf("the link is to %q: %v", target, err)
		}
	})
	t.Run("MultiFileRead", func(t *testing.T) { m.mustRead(t, point, cold(), cold(), cold()) })
	t.Run("BinaryFileRead", func(t *testing.T) {
		programs := w.files("usr/")
		if len(programs) != 50 {
			t.Fatalf("there are %d", len(programs))
		}
		m.mustRead(t, point, programs...)
	})
	t.Run("DirectoryTraversal", func(t *testing.T) {
		got, err := testenv.ScanTree(point, false)
		if err != nil {
			t.Fatal(err)
		}
		w.want.Compare(t, got, true)
	})
	t.Run("CachePopulated", func(t *testing.T) {
		i, err := m.Image(t.Context(), point)
		if err != nil || i.BytesPresent == 0 || i.BytesFetched == 0 || i.CorruptChunks != 0 {
			t.Errorf("%+v, %v", i, err)
		}
		// What somebody waits for comes before what is read ahead.
		told := d.told()
		if told["p2p true prefetch true priority 6"] == 0 {
			t.Errorf("nobody waited: %v", told)
		}
		delete(told, "p2p true prefetch true priority 6")
		delete(told, "p2p true prefetch true priority 3")
		if len(told) > 0 {
			t.Errorf("the proxy was told %v", told)
		}
	})
	t.Run("ReReadConsistency", func(t *testing.T) {
		before := d.served()
		m.mustRead(t, point, w.files("usr/")...)
		if n := d.served() - before; n != 0 {
			t.Errorf("%d requests for what is there", n)
		}
	})
	w.proxyDies(t, d, m, point, cold, mode["fallback"] == true)
	for _, name := range []string{"SDKClientCreated", "P2PActivity", "KillScheduler_SDKFallback"} {
		if mode["dragonfly_scheduler_endpoint"] != nil {
			t.Run(name, func(t *testing.T) { t.Skip("peers are reached through the proxy: there is no peer library") })
		}
	}
}

// proxyDies is the part of the catalogue that kills the proxy.
func (w *world) proxyDies(t *testing.T, d *dfdaemon, m *machine, point string, cold func() string, fallback bool) {
	t.Helper()
	from := len(m.log(t))
	t.Run("KillDfdaemon_HealthCheckDetection", func(t *testing.T) {
		d.kill()
		m.awaitLog(t, from, "Detected proxy unhealthy", detection)
	})
	name := cold()
	t.Run("ReadWithProxyDown", func(t *testing.T) {
		if fallback {
			m.mustRead(t, point, name)
			return
		}
		m.mustFail(t, point, name)
	})
	if fallback {
		t.Run("FallbackLogging", func(t *testing.T) { m.awaitLog(t, from, "fallback", time.Second) })
	} else {
		t.Run("ProxyUnhealthy_NoFallback", func(t *testing.T) {
			if took := m.mustFail(t, point, cold()); took > 5*time.Second {
				t.Errorf("it took %v to say no", took)
			}
			m.awaitLog(t, from, "it is unhealthy, and there is no fallback", time.Second)
		})
	}
	t.Run("RestartAndRecover", func(t *testing.T) {
		before := d.served()
		d.start(t)
		m.awaitLog(t, from, "Backend proxy recovered", detection)
		m.recovers(t, point, name)
		m.whole(t, point)
		if d.served() == before {
			t.Error("the proxy is not asked any more")
		}
	})
}

// useHTTP has a registry that speaks TLS, and a proxy that is asked without, to see the paths.
func (w *world) useHTTP(t *testing.T) {
	ca := services.NewCA(t)
	origin := w.seeded(t, services.RegistryOptions{TLS: ca})
	pem, err := os.ReadFile(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	d, m := newDfdaemon(t), w.start(t)
	d.scheme, d.transport.TLSClientConfig = "https", &tls.Config{RootCAs: x509.NewCertPool()}
	d.transport.TLSClientConfig.RootCAs.AppendCertsFromPEM(pem)
	point := m.mount(t, "registry", at(origin.Addr, "https", object{
		"ca_cert_files": []string{ca.File}, "proxy": object{"url": "http://" + d.addr, "use_http": true, "fallback": true},
	}))
	m.whole(t, point)
	if d.served() == 0 {
		t.Error("the proxy saw no path of a blob")
	}
	if log := m.log(t); strings.Contains(log, "fallback") {
		t.Error("the proxy was not good enough")
	}
}

// injection makes the proxy fail in one way, with a cold cache, and then no more.
func (w *world) injection(t *testing.T, origin *services.Process) {
	for name, row := range map[string]struct {
		fault http.HandlerFunc
		fails bool
	}{
		"429":   {refuse(http.StatusTooManyRequests), false},
		"403":   {refuse(http.StatusForbidden), true},
		"500":   {refuse(http.StatusInternalServerError), false},
		"stall": {stall(10 * time.Second), false},
	} {
		for mode, fallback := range map[string]bool{"fallback": true, "strict": false} {
			t.Run(name+"-"+mode, func(t *testing.T) {
				t.Parallel()
				d, m, point := w.behind(t, origin, object{"fallback": fallback})
				program := "usr/bin/program-00"
				d.fail(row.fault)
				if row.fails {
					m.mustFail(t, point, program)
				} else {
					m.mustRead(t, point, program)
				}
				before := d.served()
				d.fail(nil)
				m.recovers(t, point, program)
				m.whole(t, point)
				if d.served() == before {
					t.Error("the proxy is not asked any more")
				}
			})
		}
	}
}
