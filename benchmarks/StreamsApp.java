import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.node.ArrayNode;
import com.fasterxml.jackson.databind.node.ObjectNode;
import java.util.Properties;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.atomic.AtomicLong;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.utils.Bytes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsBuilder;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.kstream.Consumed;
import org.apache.kafka.streams.kstream.Materialized;
import org.apache.kafka.streams.state.KeyValueStore;

/**
 * The speed layer's aggregation as a Kafka Streams application, for `stream_throughput.py --kafka-streams`: the last five actions,
 * counter and last action time of each user in RocksDB, with a changelog topic and exactly-once processing (version 2). It has
 * no archive and nothing in Redis. Arguments: brokers, topic, events, folder, threads. Prints events a second.
 */
public final class StreamsApp {
    private static final int KEEP = 5;
    private static final ObjectMapper JSON = new ObjectMapper();

    private static byte[] update(byte[] value, byte[] before) {
        try {
            JsonNode event = JSON.readTree(value);
            ObjectNode known = before.length == 0 ? JSON.createObjectNode() : (ObjectNode) JSON.readTree(before);
            ArrayNode last = JSON.createArrayNode();
            last.addArray().add(event.get("item_id")).add(event.get("event_type")).add(event.get("ts"));
            for (JsonNode action : known.path("last")) {
                if (last.size() < KEEP) {
                    last.add(action);
                }
            }
            known.set("last", last);
            known.put("last_ts", Math.max(known.path("last_ts").asLong(), event.get("ts").asLong()));
            known.put("events", known.path("events").asLong() + 1);
            return JSON.writeValueAsBytes(known);
        } catch (java.io.IOException error) {
            throw new java.io.UncheckedIOException(error);
        }
    }

    public static void main(String[] args) throws InterruptedException {
        long count = Long.parseLong(args[2]);
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, "kafka-streams");
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, args[0]);
        settings.put(StreamsConfig.STATE_DIR_CONFIG, args[3]);
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, args[4]);
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2);
        settings.put(StreamsConfig.REPLICATION_FACTOR_CONFIG, 1);
        settings.put("auto.offset.reset", "earliest");
        AtomicLong done = new AtomicLong();
        AtomicLong started = new AtomicLong();
        CountDownLatch ended = new CountDownLatch(1);
        StreamsBuilder builder = new StreamsBuilder();
        builder.stream(args[1], Consumed.with(Serdes.String(), Serdes.ByteArray()))
                .groupByKey()
                .aggregate(
                        () -> new byte[0],
                        (user, value, before) -> {
                            started.compareAndSet(0, System.nanoTime());
                            byte[] after = update(value, before);
                            if (done.incrementAndGet() == count) {
                                ended.countDown();
                            }
                            return after;
                        },
                        Materialized.<String, byte[], KeyValueStore<Bytes, byte[]>>as("users")
                                .withKeySerde(Serdes.String())
                                .withValueSerde(Serdes.ByteArray()));
        KafkaStreams streams = new KafkaStreams(builder.build(), settings);
        streams.start();
        ended.await();
        System.out.println(count / ((System.nanoTime() - started.get()) / 1e9));
        streams.close();
        System.exit(0);
    }
}
